"""The k-th largest key of a row: a sample says about where it lies, and few keys are looked at."""

from __future__ import annotations

import numpy as np

from merge_cli.kernels.compiled.arrays import (
    as_words,
    new_f32,
    new_f32_rows,
    new_i32,
    new_i64,
    new_u8,
    new_u32,
)
from merge_cli.kernels.compiled.kernel import MAGNITUDE, U32, kernel
from merge_cli.kernels.compiled.parts import part
from merge_cli.kernels.compiled.tile_measures import count_equal_tile
from merge_cli.kernels.compiled.tiles import TILE, load_tile, tile_of

# A key has 31 bits, of which 11 are looked at together. The last two digits share two bits.
_BINS = 2**11
_DIGIT = U32(_BINS - 1)
_SAMPLE, _LEAST_STEP = 1024, 16  # elements, about, and one of how many at least
_LARGEST = U32(0xFFFFFFFF)


@part()
def select_key(keys, count, rank, counts):
    """The rank-th largest of the first `count` keys, digit after digit; the keys are moved.

    Args:
        counts: scratch, int32 [2048].

    Returns:
        (key, how many keys that equal it are among the `rank` largest, how many there are).
    """
    for shift in (U32(20), U32(9), U32(0)):
        counts[:] = 0
        for i in range(count):
            counts[(keys[i] >> shift) & _DIGIT] += 1
        digit = _BINS - 1
        while counts[digit] < rank:
            rank -= counts[digit]
            digit -= 1
        same = 0
        for i in range(count):  # without a branch, which would be guessed wrong
            key = keys[i]
            keys[same] = key
            same += np.intp(((key >> shift) & _DIGIT) == U32(digit))
        count = same
    return keys[0], rank, count


@part()
def move_range(row, low, high, moved):
    """Move the keys of a row that are from `low` to `high` together.

    Args:
        moved: uint32, one longer than the row.

    Returns:
        how many keys are larger, and how many are moved.
    """
    keys, inside = new_u32(TILE), new_u8(TILE)
    eights = inside.view(np.uint64)
    above, count, span = 0, 0, U32(high - low)
    for begin in range(0, len(row), TILE):
        bits = as_words(row[begin : begin + TILE])
        larger = U32(0)
        for i in range(len(bits)):
            keys[i] = bits[i] & MAGNITUDE
            larger = U32(larger + U32(keys[i] > high))
        above += larger
        inside[len(bits) :] = 0
        for i in range(len(bits)):
            inside[i] = np.uint8(U32(keys[i] - low) <= span)
        for e in range(len(eights)):
            if eights[e]:  # where few are inside, most eights are passed by
                for i in range(8 * e, 8 * e + 8):
                    moved[count] = keys[i]
                    count += np.intp(inside[i])
    return above, count


@part()
def rank_row(row, k, left_over, counts):
    """The k-th largest key of a row, and the index up to which elements with it are kept.

    A sample brackets the key. What lies in the bracket is moved together, for weights a tenth of a
    row, and only that is searched; all of a short row, and where the bracket has missed the key.

    Args:
        left_over, counts: scratch; uint32, one longer than the row, and int32 [2048].
    """
    size = len(row)
    bits = as_words(row)
    low, high, above, count, step = U32(0), _LARGEST, 0, 0, size // _SAMPLE
    if step >= _LEAST_STEP:
        taken = (size + step - 1) // step
        for i in range(taken):
            key = bits[i * step] & MAGNITUDE
            left_over[i] = key
            left_over[taken + i] = key
        expected = k * taken / size
        margin = 3.0 + 3.0 * np.sqrt(expected * (1.0 - expected / taken))
        first, last = np.int64(expected - margin), np.int64(expected + margin)
        if last <= taken:
            low = select_key(left_over[taken:], taken, last, counts)[0]
        if first >= 1:
            high = select_key(left_over, taken, first, counts)[0]
        above, count = move_range(row, low, high, left_over)
    if not above < k <= above + count:
        above, count, low, high = 0, size, U32(0), _LARGEST
        for i in range(size):
            left_over[i] = bits[i] & MAGNITUDE
    key, kept = low, k - above
    if low != high:
        key, kept, count = select_key(left_over, count, kept, counts)
    # Of `count` elements with this key `kept` are kept, the first ones.
    if kept == count:
        return key, size - 1
    begin = 0
    equal = count_equal_tile(row[:TILE], key)
    while equal < kept:
        kept -= equal
        begin += TILE
        equal = count_equal_tile(row[begin : begin + TILE], key)
    last = begin - 1
    while kept > 0:
        last += 1
        kept -= np.intp((bits[last] & MAGNITUDE) == key)
    return key, last


@kernel("void(f4[:, ::1], i8[::1], i8[::1], i8[::1])")
def kth_largest(rows, ks, keys, last_kept):
    """`rank_row` of each row."""
    left_over = new_u32(rows.shape[1] + 1)
    counts = new_i32(_BINS)
    for s in range(len(rows)):
        keys[s], last_kept[s] = rank_row(rows[s], ks[s], left_over, counts)


call_kth_largest = kth_largest.by_address


@kernel("void(i8, u1[::1], i8[::1], i8[::1], i8, boolean, i8[::1], u4[:, ::1], i8[::1])")
def rank_stored(address, stored, starts, kinds, size, based, ks, rules, ties):
    """The cut of each source of a whole tensor that keeps its ks[s] largest elements.

    Args:
        address: of `kth_largest`.
        stored, starts, kinds, size, based: see `fused`.
        ks: 0 where there is a cut already.
        rules, ties: as `merge_disjoint` takes them, filled.
    """
    base, row = new_f32(size), new_f32_rows(1, size)
    key, last = new_i64(1), new_i64(1)
    first = 1 if based else 0
    for i in range(len(starts)):
        s = i - first
        if s >= 0 and not ks[s]:
            continue
        raw = tile_of(stored, starts[i], kinds[i], 0, size)
        load_tile(raw, kinds[i], based and s >= 0, base, base if s < 0 else row[0])
        if s >= 0:
            call_kth_largest(address, (row, ks[s : s + 1], key, last))
            rules[s, 0], ties[s] = key[0], last[0] + 1
