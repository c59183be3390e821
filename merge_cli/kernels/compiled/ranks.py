"""The k-th largest key of a row: three histograms of its digits, each over what is left."""

from __future__ import annotations

import numpy as np

from merge_cli.kernels.compiled.kernel import MAGNITUDE, U32, as_words, kernel, part
from merge_cli.kernels.compiled.tiles import load_tile, tile_of

# A key has 31 bits: a first digit of 11 (exponent and three bits), then two of 10.
_FIRST, _DIGIT = U32(20), U32(10)
_FIRST_BINS, _BINS = 2**11, 2**10


@part()
def rank_row(row, k, left_over, counts):
    """The k-th largest key of a row, and the index up to which elements with it are kept.

    Keys that share the first digit of the one that is looked for are moved together without a
    branch, and only these are counted by their next digits: for weights a tenth of a row.

    Args:
        left_over, counts: scratch; uint32 as long as the row, int32 [2048].
    """
    size = len(row)
    bits = as_words(row)
    counts[:] = 0
    for i in range(size):
        counts[(bits[i] & MAGNITUDE) >> _FIRST] += 1
    digit, rank = _FIRST_BINS - 1, k
    while counts[digit] < rank:
        rank -= counts[digit]
        digit -= 1
    prefix, count = U32(digit), 0
    for i in range(size):
        key = bits[i] & MAGNITUDE
        left_over[count] = key
        count += np.intp((key >> _FIRST) == prefix)
    for shift in (_DIGIT, U32(0)):
        counts[:_BINS] = 0
        for i in range(count):
            counts[(left_over[i] >> shift) & U32(_BINS - 1)] += 1
        digit = _BINS - 1
        while counts[digit] < rank:
            rank -= counts[digit]
            digit -= 1
        prefix = (prefix << _DIGIT) | U32(digit)
        same = 0
        for i in range(count):
            key = left_over[i]
            left_over[same] = key
            same += np.intp((key >> shift) == prefix)
        count = same
    # Of `count` elements with this key `rank` are kept, the first ones.
    if rank == count:
        return prefix, size - 1
    last = -1
    while rank > 0:
        last += 1
        rank -= np.intp((bits[last] & MAGNITUDE) == prefix)
    return prefix, last


@kernel("void(f4[:, ::1], i8[::1], i8[::1], i8[::1])")
def kth_largest(rows, ks, keys, last_kept):
    """`rank_row` of each row."""
    left_over = np.empty(rows.shape[1], np.uint32)
    counts = np.empty(_FIRST_BINS, np.int32)
    for s in range(len(rows)):
        keys[s], last_kept[s] = rank_row(rows[s], ks[s], left_over, counts)


@kernel("void(u1[::1], i8[::1], i8[::1], i8, boolean, i8[::1], u4[:, ::1], i8[::1])")
def rank_stored(stored, starts, kinds, size, based, ks, rules, ties):
    """The cut of each source of a whole tensor that keeps its ks[s] largest elements.

    Args:
        stored, starts, kinds, size, based: see `fused`.
        ks: 0 where there is a cut already.
        rules, ties: as `merge_disjoint` takes them, filled.
    """
    base, row = np.empty(size, np.float32), np.empty(size, np.float32)
    left_over, counts = np.empty(size, np.uint32), np.empty(_FIRST_BINS, np.int32)
    first = 1 if based else 0
    for i in range(len(starts)):
        s = i - first
        if s >= 0 and not ks[s]:
            continue
        raw = tile_of(stored, starts[i], kinds[i], 0, size)
        load_tile(raw, kinds[i], based and s >= 0, base, base if s < 0 else row)
        if s >= 0:
            key, last = rank_row(row, ks[s], left_over, counts)
            rules[s, 0], ties[s] = key, last + 1
