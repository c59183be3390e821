"""Magnitudes: counting keys (the bits of |x|), and trimming by them."""

from __future__ import annotations

from merge_cli.kernels.compiled.arrays import as_words, new_u32
from merge_cli.kernels.compiled.kernel import INFINITY, MAGNITUDE, U32, kernel
from merge_cli.kernels.compiled.tile_measures import (
    count_equal_tile,
    count_keys_tile,
    count_range_tile,
    count_trimmed_tile,
)
from merge_cli.kernels.compiled.tiles import TILE


@kernel("i8(f4[::1], u4, u4, u4, i4[::1])")
def count_range(values, low, high, shift, counts):
    """Count keys (bits of |x|) in [low, high] by (key - low) >> shift; how many are above?"""
    above = 0
    offsets, inside = new_u32(TILE), new_u32(TILE)
    for begin in range(0, len(values), TILE):
        row = values[begin : begin + TILE]
        above += count_range_tile(row, low, high, shift, offsets, inside, counts)
    return above


@kernel("void(f4[::1], u4[::1], i8[::1], i8[::1])")
def count_keys(values, candidates, above, equal):
    """For each candidate, add how many keys are larger and how many are equal."""
    for begin in range(0, len(values), TILE):
        count_keys_tile(values[begin : begin + TILE], candidates, above, equal)


@kernel("void(f4[:, ::1], u4[::1], i8[::1], f4[:, ::1])")
def trim(rows, thresholds, ties, out):
    """Rows where the key is above the threshold, or equal to it among the first `ties`; else 0.

    NaN is dropped: it is above no number.
    """
    for s in range(len(rows)):
        threshold, first = thresholds[s], ties[s]
        bits, result = as_words(rows[s, :first]), as_words(out[s, :first])
        for i in range(len(bits)):
            key = bits[i] & MAGNITUDE
            result[i] = bits[i] if (key >= threshold) & (key <= INFINITY) else U32(0)
        bits, result = as_words(rows[s, first:]), as_words(out[s, first:])
        for i in range(len(bits)):
            key = bits[i] & MAGNITUDE
            result[i] = bits[i] if (key > threshold) & (key <= INFINITY) else U32(0)


@kernel("i8(f4[::1], u4, i8)")
def count_kept(values, threshold, ties):
    """How many `trim` keeps."""
    return count_trimmed_tile(values, threshold, ties)


@kernel("i8(f4[::1], u4, i8)")
def find_tie(values, threshold, ordinal):
    """The index of the ordinal-th (from 1) key that equals the threshold, or -1 - their number."""
    seen = 0
    for begin in range(0, len(values), TILE):
        row = values[begin : begin + TILE]
        here = count_equal_tile(row, threshold)
        if seen + here >= ordinal:
            bits = as_words(row)
            for i in range(len(bits)):
                seen += (bits[i] & MAGNITUDE) == threshold
                if seen == ordinal:
                    return begin + i
        seen += here
    return -1 - seen


@kernel("i8(u4[::1], u4, u4, u4[::1])")
def distinct_keys(sample, low, high, distinct):
    """The distinct keys from low to high, in the order of the sample, as far as there is room.

    Returns:
        how many there are; one more than have room where there are more.
    """
    count, span = 0, U32(high - low)
    for i in range(len(sample)):
        key = sample[i]
        if U32(key - low) > span:
            continue
        n = 0
        while n < count and distinct[n] != key:
            n += 1
        if n == len(distinct):
            return n + 1
        if n == count:
            distinct[count] = key
            count += 1
    return count


@kernel(["i8(i4[::1], i4[::1], i8[::1])", "i8(i8[::1], i4[::1], i8[::1])"])
def not_empty(counts, indexes, filled):
    """Move the bins that hold something together; returns how many there are."""
    size = 0
    for begin in range(0, len(counts), 64):
        bins = counts[begin : begin + 64]
        together = bins[0]
        for i in range(len(bins)):
            together |= bins[i]
        if together != 0:
            for i in range(len(bins)):
                if bins[i] > 0:
                    indexes[size] = begin + i
                    filled[size] = bins[i]
                    size += 1
    return size
