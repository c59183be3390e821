"""Whole chunks, and many small tensors, in one call: read, merged, measured and written.

The loops of `fused` over blocks that lie in files. Nothing here holds Python's lock, however many
blocks there are, and a block is still read, merged and written while it is in the cache.
`kernels.streams` makes the tables, a row for each job: elements of one tensor.

A job that stops (a read or write that fails, NaN, a result that float16 cannot hold) ends the call.
Its first column then says at which element, and Python does that block in the plain way.
"""

from __future__ import annotations

from merge_cli.kernels.compiled.arrays import as_bytes, new_f32, new_i64
from merge_cli.kernels.compiled.files import (
    layout,
    load_block,
    seconds_by,
    width_of,
    write_exactly,
)
from merge_cli.kernels.compiled.fused import merge_disjoint, merge_linear
from merge_cli.kernels.compiled.kernel import U32, kernel
from merge_cli.kernels.compiled.parts import part
from merge_cli.kernels.compiled.passes import (
    count_stored,
    dot_stored,
    find_stored,
    keys_stored,
    measure_stored,
)
from merge_cli.kernels.compiled.ranks import rank_stored
from merge_cli.kernels.compiled.tiles import FLOAT32

# The columns of `jobs`: elements [start, stop) of a tensor; where its output's bytes begin, and how
# they are encoded; which elements are measured (`run` of every `period`); whether the first block
# lies in the buffer already; what the formula does.
START, STOP, TARGET, TARGET_OFFSET, TARGET_KIND, RUN, PERIOD = 0, 1, 2, 3, 4, 5, 6
LOADED, DROPS, ELECTS, WEIGHTED, DIVIDE_BY = 7, 8, 9, 10, 11
# What is dropped of the sources.
NO_DROP, BY_MASK, BY_CUT = 0, 1, 2
# The columns of `numbers`.
DIVISOR, SCALE, ZERO_SIGN = 0, 1, 2
_WORD = 0xFFFFFFFF

call_linear, call_disjoint = merge_linear.by_address, merge_disjoint.by_address
call_measure, call_rank = measure_stored.by_address, rank_stored.by_address
call_count, call_dot = count_stored.by_address, dot_stored.by_address
call_find, call_keys = find_stored.by_address, keys_stored.by_address


@part()
def move_ties(ties, at, here):
    """An index in the tensor as one that counts from element `at`, for each source."""
    for s in range(len(here)):
        here[s] = ties[s] - at


@part()
def merge_elements(
    merges, stored, at, based, job, numbers, weights, factors, rules, ties, out, kind
):
    """Merge elements from element `at` of the tensor on.

    Args:
        merges: addresses of `merge_linear` and `merge_disjoint`.
        stored: the buffer, where the inputs begin there, how they are encoded, and their size.
    """
    drops = rules, ties, factors, U32(at & _WORD)
    if job[ELECTS]:
        election = job[WEIGHTED] != 0, job[DIVIDE_BY], numbers[ZERO_SIGN], numbers[SCALE]
        return call_disjoint(merges[1], (*stored, weights, *election, *drops, out, kind))
    sums = weights, numbers[DIVISOR], numbers[SCALE], rules, factors, U32(at & _WORD)
    return call_linear(merges[0], (*stored, based, *sums, out, kind))


@kernel(
    "i8(i8[::1], u1[::1], i8, boolean, i8[:, ::1], i8[:, :, ::1], f4[:, ::1], f4[:, ::1], "
    "f4[:, ::1], u4[:, :, ::1], i8[:, ::1], i8[:, ::1], f8[:, :, ::1], i8[:, :, ::1], "
    "i8[:, :, ::1], i8[:, ::1], f8[:, ::1], boolean, i8, i8, f8[::1])"
)
def merge_streams(
    addresses,
    buffer,
    block,
    based,
    jobs,
    inputs,
    numbers,
    weights,
    factors,
    rules,
    ties,
    ks,
    gram,
    both,
    agree,
    counts,
    squares,
    pairs,
    first_job,
    clock,
    spent,
):
    """Merge every job, from `first_job` on, in blocks of so many elements.

    Args:
        addresses: of `merge_linear`, `merge_disjoint`, `measure_stored`, `rank_stored` and
            `kth_largest`; 0 for what is not used.
        ties: of each job and source how many elements of the tensor, from its first on, may be
            kept where they equal a cut's threshold.
        ks: how many elements of a source are kept, where its cut is not known yet: for jobs of one
            block, which is a whole tensor. Else 0.
        clock, spent: seconds of reading and writing by this clock, and bytes that were read and
            written, are added.

    Returns:
        the job that stopped; their number if none did.
    """
    time = new_i64(2)
    operands = inputs.shape[1]
    starts, kinds = new_i64(operands), new_i64(operands)
    run_starts, ties_here = new_i64(operands), new_i64(ties.shape[1])
    for j in range(first_job, len(jobs)):
        job = jobs[j]
        stop, drops, kind, period = job[STOP], job[DROPS], job[TARGET_KIND], job[PERIOD]
        room = layout(inputs[j], min(block, stop - job[START]), starts, kinds)
        # No rows of rules, or no ties, say that nothing is dropped, or not by magnitude.
        its_rules = rules[j, : (rules.shape[1] if drops != NO_DROP or job[ELECTS] else 0)]
        here = ties_here[: (ties.shape[1] if drops == BY_CUT else 0)]
        formula = based, job, numbers[j], weights[j], factors[j], its_rules, here
        while job[START] < stop:
            begin = job[START]
            end = min(begin + block, stop)
            if job[LOADED]:
                job[LOADED] = 0
            elif not load_block(inputs[j], begin, end - begin, buffer, starts, kinds, clock, spent):
                return j
            stored = buffer, starts, kinds, end - begin
            if drops == BY_CUT:
                if addresses[3]:
                    cuts = ks[j], rules[j], ties[j]
                    call_rank(addresses[3], (addresses[4], *stored, based, *cuts))
                move_ties(ties[j], begin, here)
            out = buffer[room : room + (end - begin) * width_of(kind)]
            if merge_elements(addresses, stored, begin, *formula, out, kind):
                return j
            began = seconds_by(clock, time)
            offset = job[TARGET_OFFSET] + begin * width_of(kind)
            was_written = write_exactly(job[TARGET], offset, out)
            spent[1] += seconds_by(clock, time) - began
            if not was_written:
                return j
            spent[3] += len(out)
            job[START] = end
            if not job[RUN]:
                continue
            for run in range(begin // period * period, end, period):
                at, size = max(run, begin), min(run + job[RUN], end) - max(run, begin)
                if size <= 0:
                    continue
                for i in range(operands):
                    run_starts[i] = starts[i] + (at - begin) * width_of(kinds[i])
                move_ties(ties[j], at, here)
                merged = new_f32(size)
                if based:  # what it is compared with is not rounded
                    part_stored = buffer, run_starts, kinds, size
                    raw = as_bytes(merged)
                    merge_elements(addresses, part_stored, at, *formula, raw, FLOAT32)
                call_measure(
                    addresses[2],
                    (
                        buffer,
                        run_starts,
                        kinds,
                        0,
                        size,
                        based,
                        merged,
                        pairs,
                        its_rules,
                        here,
                        U32(at & _WORD),
                        gram[j],
                        both[j],
                        agree[j],
                        counts[j],
                        squares[j],
                    ),
                )
    return len(jobs)


@kernel(
    "i8(i8, u1[::1], i8, boolean, i8[:, ::1], i8, i8, i8[::1], u4[:, ::1], u4[:, ::1], "
    "i8[:, ::1], i8[:, ::1], i4[:, ::1], i8, f8[::1])"
)
def count_stream(
    address,
    buffer,
    block,
    based,
    inputs,
    begin,
    stop,
    operands,
    ranges,
    candidates,
    above,
    equal,
    counts,
    clock,
    spent,
):
    """`count_stored`, which has this address, of elements [begin, stop); where it stopped."""
    starts, kinds = new_i64(len(inputs)), new_i64(len(inputs))
    layout(inputs, min(block, stop - begin), starts, kinds)
    while begin < stop:
        size = min(block, stop - begin)
        if not load_block(inputs, begin, size, buffer, starts, kinds, clock, spent):
            break
        stored = buffer, starts, kinds, size, based
        call_count(address, (*stored, operands, ranges, candidates, above, equal, counts))
        begin += size
    return begin


@kernel(
    "i8(i8, u1[::1], i8, boolean, i8[:, ::1], i8, i8, i8[::1], u4[::1], i8[::1], i8[::1], i8, "
    "i8, f8[::1])"
)
def find_stream(
    address,
    buffer,
    block,
    based,
    inputs,
    begin,
    stop,
    operands,
    keys,
    ordinals,
    indexes,
    origin,
    clock,
    spent,
):
    """`find_stored`, which has this address, of elements [begin, stop); where it stopped.

    That is `stop` when all are found. Indexes are counted from element `origin` on.
    """
    starts, kinds = new_i64(len(inputs)), new_i64(len(inputs))
    layout(inputs, min(block, stop - begin), starts, kinds)
    while begin < stop:
        size = min(block, stop - begin)
        if not load_block(inputs, begin, size, buffer, starts, kinds, clock, spent):
            break
        stored = buffer, starts, kinds, size, based
        if not call_find(address, (*stored, operands, keys, ordinals, begin - origin, indexes)):
            return stop
        begin += size
    return begin


@kernel("i8(i8, u1[::1], boolean, i8[:, ::1], i8, i8, i8, u4[:, ::1], i8, f8[::1])")
def sample_stream(address, buffer, based, inputs, size, step, run, keys, clock, spent):
    """`keys_stored`, which has this address, of the first `run` of every `step` elements.

    Returns:
        how many elements there are; -1 where they cannot be read.
    """
    starts, kinds = new_i64(len(inputs)), new_i64(len(inputs))
    layout(inputs, run, starts, kinds)
    column = 0
    for begin in range(0, size, step):
        length = min(run, size - begin)
        if not load_block(inputs, begin, length, buffer, starts, kinds, clock, spent):
            return -1
        call_keys(address, (buffer, starts, kinds, length, based, keys, column))
        column += length
    return column


@kernel("i8(i8, u1[::1], i8, boolean, i8[:, ::1], i8, i8, i8, f8[:, :, ::1], i8, f8[::1])")
def dot_stream(address, buffer, block, based, inputs, begin, stop, run, sums, clock, spent):
    """`dot_stored`, which has this address, of elements [begin, stop); where it stopped.

    Args:
        sums: for each block the products of every pair over every run.
    """
    starts, kinds = new_i64(len(inputs)), new_i64(len(inputs))
    layout(inputs, min(block, stop - begin), starts, kinds)
    for n in range(len(sums)):
        size = min(block, stop - begin)
        if not load_block(inputs, begin, size, buffer, starts, kinds, clock, spent):
            break
        call_dot(address, (buffer, starts, kinds, size, based, run, sums[n]))
        begin += size
    return begin
