"""How sources relate, in memory or read from files: see `kernels.measures`."""

from __future__ import annotations

import numpy as np

from merge_cli.kernels.compiled.arrays import (
    as_words,
    new_f32,
    new_f32_rows,
    new_i64,
    new_u8,
    new_u8_rows,
    new_u32,
)
from merge_cli.kernels.compiled.files import layout, load_block
from merge_cli.kernels.compiled.kernel import CHUNK, MAGNITUDE, U32, kernel
from merge_cli.kernels.compiled.measures import gram
from merge_cli.kernels.compiled.ranks import kth_largest
from merge_cli.kernels.compiled.tiles import TILE, load_tile, tile_of

_EXPONENT = U32(0x7F800000)
_SEVEN = U32(7 << 23)  # bfloat16 has seven bits behind the point
# What is known of an entry, as bits of a byte: more of those are compared at once than of floats.
_LOWERED, _CHANGED, _LARGE, _STEP = map(np.uint8, range(1, 5))  # the first one is: raised
_ONE = np.uint8(1)
_U16 = np.uint16  # counts of a chunk, which are 2,048 at most


@kernel(
    "void(f4[:, ::1], u4[::1], i8[:, ::1], i8[:, ::1], i8[:, ::1], i8[:, ::1], i8[::1], i8[::1])"
)
def count_relations(rows, thresholds, both, agree, equal, large, steps, contest):
    """Add the counts of a block whose first row is the base and whose others are deltas.

    Args:
        thresholds: keys (bits of |x|) from which on an entry is one of its source's largest.
        contest: elements that two sources change or more, and those of them in conflict.
    """
    sources, size = len(rows) - 1, rows.shape[1]
    facts = new_u8_rows(sources, CHUNK)
    once, twice = new_u8(CHUNK), new_u8(CHUNK)
    step = new_u32(CHUNK)
    for begin in range(0, size, CHUNK):
        length = min(begin + CHUNK, size) - begin
        stored = as_words(rows[0, begin : begin + length])
        for i in range(length):
            exponent = stored[i] & _EXPONENT
            step[i] = exponent - _SEVEN if exponent > _SEVEN else U32(0)
        once[:] = 0
        twice[:] = 0
        for s in range(sources):
            fact, threshold = facts[s], thresholds[s]
            bits = as_words(rows[s + 1, begin : begin + length])
            for i in range(length):
                key = bits[i] & MAGNITUDE
                flags = (bits[i] >> U32(31)) + U32(5)  # changed, and raised or lowered
                flags |= U32(8) if key >= threshold else U32(0)
                flags |= U32(16) if key <= step[i] else U32(0)
                fact[i] = np.uint8(flags if key > U32(0) else U32(0))
            count, top, small = _U16(0), _U16(0), _U16(0)
            for i in range(length):
                twice[i] |= once[i] & fact[i]
                once[i] |= fact[i]
                count = _U16(count + _U16((fact[i] >> _CHANGED) & _ONE))
                top = _U16(top + _U16((fact[i] >> _LARGE) & _ONE))
                small = _U16(small + _U16((fact[i] >> _STEP) & _ONE))
            both[s, s] += count
            agree[s, s] += count
            equal[s, s] += length
            large[s, s] += top
            steps[s] += small
        shared, mixed = _U16(0), _U16(0)
        for i in range(length):
            shared = _U16(shared + _U16((twice[i] >> _CHANGED) & _ONE))
            mixed = _U16(mixed + _U16(once[i] & (once[i] >> _LOWERED) & _ONE))
        contest[0] += shared
        contest[1] += mixed
        for s in range(sources):
            for t in range(s + 1, sources):
                a, b = facts[s], facts[t]
                present, same, together = _U16(0), _U16(0), _U16(0)
                for i in range(length):
                    x = a[i] & b[i]
                    present = _U16(present + _U16((x >> _CHANGED) & _ONE))
                    same = _U16(same + _U16((x | (x >> _LOWERED)) & _ONE))
                    together = _U16(together + _U16((x >> _LARGE) & _ONE))
                first = rows[s + 1, begin : begin + length]
                second = rows[t + 1, begin : begin + length]
                alike = U32(0)
                for i in range(length):
                    alike += U32(first[i] == second[i])
                both[s, t] += present
                both[t, s] += present
                agree[s, t] += same
                agree[t, s] += same
                large[s, t] += together
                large[t, s] += together
                equal[s, t] += alike
                equal[t, s] += alike


call_count, call_gram = count_relations.by_address, gram.by_address
call_rank = kth_largest.by_address
_PIECE = 8 * CHUNK  # elements that are related while they lie in the L2 cache, four rows of them


@kernel(
    "i8(i8[::1], u1[::1], i8, i8[:, :, ::1], i8[:, ::1], i8[::1], u4[:, ::1], f8[:, :, ::1], "
    "i8[:, :, ::1], i8[:, :, ::1], i8[:, :, ::1], i8[:, :, ::1], i8[:, ::1], i8[:, ::1], i8, i8, "
    "f8[::1])"
)
def relate_streams(
    addresses,
    buffer,
    block,
    inputs,
    spans,
    ranks,
    thresholds,
    sums,
    both,
    agree,
    equal,
    large,
    steps,
    contest,
    first,
    clock,
    spent,
):
    """Read spans of tensors, from number `first` on, and add what `gram` and `count_relations` do.

    Args:
        addresses: of `kth_largest`, `gram` and `count_relations`.
        buffer: room for a block of every input, numpy uint8.
        block: elements that are read at once.
        inputs: see `files`; the first one of each tensor is its base.
        spans: the elements of each: where they begin and end.
        ranks: how many of a source's changes are its largest, where a span is a whole tensor of
            at most a block; 0 where `thresholds` has their keys.
        thresholds: for each source of each span, as `count_relations` takes them.
        clock, spent: as `merge_streams` takes them.

    Returns:
        the span that stopped, because it cannot be read, or is not finite; their number if none
        did. Of one that stops, the sums are of no use.
    """
    operands = inputs.shape[1]
    starts, kinds = new_i64(operands), new_i64(operands)
    counts, keys = new_i64(operands - 1), new_i64(operands - 1)
    last, least = new_i64(operands - 1), new_u32(operands - 1)
    for j in range(first, len(spans)):
        relations = both[j], agree[j], equal[j], large[j], steps[j], contest[j]
        least[:] = thresholds[j]
        for begin in range(spans[j, 0], spans[j, 1], block):
            size = min(block, spans[j, 1] - begin)
            layout(inputs[j], size, starts, kinds)
            if not load_block(inputs[j], begin, size, buffer, starts, kinds, clock, spent):
                return j
            piece = size if ranks[j] else _PIECE
            for at in range(0, size, piece):
                rows, is_finite = new_f32_rows(operands, min(piece, size - at)), True
                for tile in range(0, rows.shape[1], TILE):
                    length = min(TILE, rows.shape[1] - tile)
                    base = rows[0, tile : tile + length]
                    for i in range(operands):
                        raw = tile_of(buffer, starts[i], kinds[i], at + tile, length)
                        row = rows[i, tile : tile + length]
                        is_finite &= load_tile(raw, kinds[i], i > 0, base, row)
                if not is_finite:
                    return j
                if ranks[j]:
                    counts[:] = ranks[j]
                    call_rank(addresses[0], (rows[1:], counts, keys, last))
                    for s in range(len(keys)):
                        least[s] = max(keys[s], 1)  # nothing that is 0 is among the largest
                call_gram(addresses[1], (rows, sums[j]))
                call_count(addresses[2], (rows, least, *relations))
    return len(spans)


@kernel("boolean(u1[::1], i8[:, ::1], i8[::1], i8, i8[::1], f4[:, :, ::1], i8, f8[::1])")
def read_sample(buffer, inputs, firsts, length, columns, changes, clock, spent):
    """Of runs of every input some columns, less those of the first input.

    Args:
        buffer: room for a run of every input, numpy uint8.
        inputs: see `files`.
        firsts, length: where the runs begin, and their elements.
        columns: within a run.
        changes: float32 [inputs - 1, runs, columns], filled.
        clock, spent: as `merge_streams` takes them.

    Returns:
        whether all could be read.
    """
    operands = len(inputs)
    starts, kinds = new_i64(operands), new_i64(operands)
    base, row = new_f32(length), new_f32(length)
    layout(inputs, length, starts, kinds)
    for r in range(len(firsts)):
        if not load_block(inputs, firsts[r], length, buffer, starts, kinds, clock, spent):
            return False
        for i in range(operands):
            raw = tile_of(buffer, starts[i], kinds[i], 0, length)
            load_tile(raw, kinds[i], i > 0, base, row if i > 0 else base)
            if i > 0:
                for c in range(len(columns)):
                    changes[i - 1, r, c] = row[columns[c]]
    return True
