"""Passes over stored bytes that write nothing: counts, keys, products, sums for the report.

Inputs lie as `fused` says. See `kernels.passes`, and `kernels.fused.measure`.
"""

from __future__ import annotations

from merge_cli.kernels.compiled.arrays import (
    as_words,
    new_f32,
    new_f32_rows,
    new_f64_rows,
    new_i32,
    new_i32_rows,
    new_u32,
)
from merge_cli.kernels.compiled.kernel import MAGNITUDE, U32, kernel
from merge_cli.kernels.compiled.tile_measures import (
    count_equal_tile,
    count_keys_tile,
    count_range_tile,
    count_trimmed_tile,
    count_words_tile,
    dot_lanes_tile,
    dot_tile,
    relate_tile,
    square_change_tile,
)
from merge_cli.kernels.compiled.tiles import TILE, load_tile, tile_of


@kernel(
    "void(u1[::1], i8[::1], i8[::1], i8, i8, boolean, f4[::1], boolean, u4[:, ::1], i8[::1], u4, "
    "f8[:, ::1], i8[:, ::1], i8[:, ::1], i8[::1], f8[::1])"
)
def measure_stored(
    stored,
    starts,
    kinds,
    begin,
    end,
    based,
    merged,
    pairs,
    rules,
    ties,
    low,
    gram,
    both,
    agree,
    counts,
    squares,
):
    """Add to the report's sums over elements [begin, end): see `engine.merge_stats`.

    Args:
        merged: the result, not rounded, of these elements.
        pairs: whether dot products and signs of every pair are wanted.
        rules, ties: as `merge_disjoint` takes them; no rows of `rules` where nothing is dropped.
        counts: elements in conflict, then what is kept of each source.
        squares: of the base, and of what is merged less the base.
    """
    first = 1 if based else 0
    sources = len(starts) - first
    base = new_f32(TILE)
    rows = new_f32_rows(sources, TILE)
    signs = new_i32_rows(sources, TILE)
    least, most = new_i32(TILE), new_i32(TILE)
    for at in range(begin, end, TILE):
        length = min(TILE, end - at)
        minus = base[:length]
        for i in range(len(starts)):
            s = i - first
            values = minus if s < 0 else rows[s, :length]
            raw = tile_of(stored, starts[i], kinds[i], at, length)
            load_tile(raw, kinds[i], based and s >= 0, minus, values)
            if s < 0:
                done = at - begin
                squares[0] += dot_tile(minus, minus)
                squares[1] += square_change_tile(minus, merged[done : done + length])
                continue
            if len(rules):
                if rules[s, 3]:
                    counts[1 + s] += length
                elif len(ties):
                    here = min(max(ties[s] - at, 0), length)
                    counts[1 + s] += count_trimmed_tile(values, rules[s, 0], here)
                else:
                    word = U32(low + U32(at))
                    kept = count_words_tile(length, rules[s, 0], rules[s, 1], rules[s, 2], word)
                    counts[1 + s] += kept
        for s in range(sources):
            for t in range(s, sources if pairs else s + 1):
                product = dot_tile(rows[s, :length], rows[t, :length])
                gram[s, t] += product
                if s != t:
                    gram[t, s] += product
        if pairs and sources > 1:
            counts[0] += relate_tile(rows, 0, length, signs, least, most, both, agree)


@kernel(
    "void(u1[::1], i8[::1], i8[::1], i8, boolean, i8[::1], u4[:, ::1], u4[:, ::1], i8[:, ::1], "
    "i8[:, ::1], i4[:, ::1])"
)
def count_stored(
    stored, starts, kinds, size, based, operands, ranges, candidates, above, equal, counts
):
    """Count the keys (bits of |x|) of some sources, or task vectors: see `kernels.keys`.

    Args:
        operands: indexes of the sources, one for each row of the rest.
        ranges: low, high, shift, and how many candidates are counted instead.
        above: keys above each candidate; above the range in the first column.
        counts: the histogram of each range.
    """
    first = 1 if based else 0
    base, row = new_f32(TILE), new_f32(TILE)
    offsets, inside = new_u32(TILE), new_u32(TILE)
    for begin in range(0, size, TILE):
        length = min(TILE, size - begin)
        minus, values = base[:length], row[:length]
        for k in range(len(operands) + first):
            n = k - first
            i = 0 if n < 0 else operands[n] + first
            raw = tile_of(stored, starts[i], kinds[i], begin, length)
            load_tile(raw, kinds[i], based and n >= 0, minus, minus if n < 0 else values)
            if n < 0:
                continue
            few = ranges[n, 3]
            if few:
                count_keys_tile(values, candidates[n, :few], above[n], equal[n])
            else:
                low, high, shift = ranges[n, 0], ranges[n, 1], ranges[n, 2]
                above[n, 0] += count_range_tile(
                    values, low, high, shift, offsets, inside, counts[n]
                )


@kernel("i8(u1[::1], i8[::1], i8[::1], i8, boolean, i8[::1], u4[::1], i8[::1], i8, i8[::1])")
def find_stored(stored, starts, kinds, size, based, operands, keys, ordinals, at, indexes):
    """Look for the ordinals[n]-th element (from 1) of operand n whose key is keys[n].

    Args:
        ordinals: less what is passed here; 0 once it is found, and then passed by.
        at: the index of the first element.
        indexes: of those that are found, filled.

    Returns:
        how many are still looked for.
    """
    first = 1 if based else 0
    base, row = new_f32(TILE), new_f32(TILE)
    left = 0
    for n in range(len(ordinals)):
        left += 1 if ordinals[n] else 0
    for begin in range(0, size, TILE):
        length = min(TILE, size - begin)
        minus, values = base[:length], row[:length]
        for k in range(len(operands) + first):
            n = k - first
            if n >= 0 and not ordinals[n]:
                continue
            i = 0 if n < 0 else operands[n] + first
            raw = tile_of(stored, starts[i], kinds[i], begin, length)
            load_tile(raw, kinds[i], based and n >= 0, minus, minus if n < 0 else values)
            if n < 0:
                continue
            equal = count_equal_tile(values, keys[n])
            if equal < ordinals[n]:
                ordinals[n] -= equal
                continue
            bits, j = as_words(values), -1
            while ordinals[n]:
                j += 1
                ordinals[n] -= 1 if U32(bits[j] & MAGNITUDE) == keys[n] else 0
            indexes[n] = at + begin + j
            left -= 1
        if not left:
            break
    return left


@kernel("void(u1[::1], i8[::1], i8[::1], i8, boolean, u4[:, ::1], i8)")
def keys_stored(stored, starts, kinds, size, based, keys, column):
    """The keys of every source, or task vector: into keys[s, column : column + size]."""
    first = 1 if based else 0
    base, row = new_f32(TILE), new_f32(TILE)
    for begin in range(0, size, TILE):
        length = min(TILE, size - begin)
        minus, values = base[:length], row[:length]
        for i in range(len(starts)):
            s = i - first
            raw = tile_of(stored, starts[i], kinds[i], begin, length)
            load_tile(raw, kinds[i], based and s >= 0, minus, minus if s < 0 else values)
            if s >= 0:
                bits = as_words(values)
                into = keys[s, column + begin : column + begin + length]
                for j in range(length):
                    into[j] = bits[j] & MAGNITUDE


@kernel("void(u1[::1], i8[::1], i8[::1], i8, boolean, i8, f8[:, ::1])")
def dot_stored(stored, starts, kinds, size, based, run, sums):
    """The dot products of every pair of sources, or task vectors, over runs of elements.

    The pairs (i, j) with i <= j are the rows of `sums`, in order; runs are its columns. The order
    of additions is that of `kernels.reduce.dot_runs`.
    """
    first = 1 if based else 0
    sources = len(starts) - first
    base = new_f32(TILE)
    rows = new_f32_rows(sources, TILE)
    accumulators = new_f64_rows(len(sums), 64)
    for r in range(sums.shape[1]):
        end = min((r + 1) * run, size)
        accumulators[:] = 0.0
        for begin in range(r * run, end, TILE):
            length = min(TILE, end - begin)
            minus = base[:length]
            for i in range(len(starts)):
                s = i - first
                values = minus if s < 0 else rows[s, :length]
                raw = tile_of(stored, starts[i], kinds[i], begin, length)
                load_tile(raw, kinds[i], based and s >= 0, minus, values)
            pair = 0
            for s in range(sources):
                for t in range(s, sources):
                    dot_lanes_tile(rows[s, :length], rows[t, :length], accumulators[pair])
                    pair += 1
        for pair in range(len(sums)):
            total = 0.0
            for j in range(64):
                total += accumulators[pair, j]
            sums[pair, r] = total
