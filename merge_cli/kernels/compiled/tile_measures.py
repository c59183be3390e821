"""Parts of kernels that measure a tile and leave it as it is: counts, keys, signs, dot products."""

from __future__ import annotations

import numpy as np

from merge_cli.kernels.compiled.arrays import as_words
from merge_cli.kernels.compiled.kernel import F32, INFINITY, MAGNITUDE, U32
from merge_cli.kernels.compiled.parts import part
from merge_cli.kernels.compiled.tiles import mixed_word

_SUMS = {"reassoc", "nsz"}


@part()
def count_words_tile(size, k0, k1, limit, low):
    """How many elements of a tile `drop_tile` keeps."""
    kept = U32(0)
    for i in range(size):
        kept = U32(kept + U32(mixed_word(U32(low + U32(i)), k0, k1) < limit))
    return np.int64(kept)


@part()
def count_trimmed_tile(row, threshold, ties):
    """How many elements of a tile `trim_tile` keeps."""
    kept = U32(0)
    bits = as_words(row[:ties])
    for i in range(len(bits)):
        key = U32(bits[i] & MAGNITUDE)
        kept = U32(kept + U32((key >= threshold) & (key <= INFINITY)))
    bits = as_words(row[ties:])
    for i in range(len(bits)):
        key = U32(bits[i] & MAGNITUDE)
        kept = U32(kept + U32((key > threshold) & (key <= INFINITY)))
    return np.int64(kept)


@part()
def count_range_tile(row, low, high, shift, offsets, inside, counts):
    """`magnitudes.count_range` of a tile; `offsets` and `inside` are rows of scratch."""
    bits = as_words(row)
    span = U32(high - low)
    larger = U32(0)
    for i in range(len(bits)):
        key = U32(bits[i] & MAGNITUDE)
        larger = U32(larger + U32(key > high))
        offsets[i] = U32(key - low)
    # What lies inside is moved together first, without a branch that would be guessed wrong.
    size = 0
    for i in range(len(bits)):
        inside[size] = offsets[i]
        size += np.intp(offsets[i] <= span)
    for i in range(size):
        counts[inside[i] >> shift] += 1
    return np.int64(larger)


@part()
def count_keys_tile(row, candidates, above, equal):
    """`magnitudes.count_keys` of a tile."""
    bits = as_words(row)
    for c in range(len(candidates)):
        key = candidates[c]
        larger, same = U32(0), U32(0)
        for i in range(len(bits)):
            magnitude = U32(bits[i] & MAGNITUDE)
            larger = U32(larger + U32(magnitude > key))
            same = U32(same + U32(magnitude == key))
        above[c] += larger
        equal[c] += same


@part()
def dot_lanes_tile(a, b, accumulators):
    """Add a * b in float64, element i to accumulator i mod 64: see `kernels.reduce`."""
    aligned = len(a) // 64 * 64
    for begin in range(0, aligned, 64):
        for j in range(64):
            accumulators[j] += np.float64(a[begin + j]) * np.float64(b[begin + j])
    for i in range(aligned, len(a)):
        accumulators[i - aligned] += np.float64(a[i]) * np.float64(b[i])


@part()
def count_equal_tile(row, threshold):
    """How many keys equal the threshold."""
    bits = as_words(row)
    equal = U32(0)
    for i in range(len(bits)):
        equal = U32(equal + U32(U32(bits[i] & MAGNITUDE) == threshold))
    return np.int64(equal)


@part()
def largest_key_tile(row):
    """The largest key (bits of |x|)."""
    bits = as_words(row)
    largest = U32(0)
    for i in range(len(bits)):
        key = U32(bits[i] & MAGNITUDE)
        largest = key if key > largest else largest
    return largest


@part()
def signs_tile(row, sign, least, most):
    """The signs of a row, and of each element the least and the largest that there was."""
    for i in range(len(row)):
        value = np.int32(np.int32(row[i] > 0) - np.int32(row[i] < 0))
        sign[i] = value
        least[i] = value if value < least[i] else least[i]
        most[i] = value if value > most[i] else most[i]


@part()
def count_pair_tile(a, b):
    """Of two rows of signs: on how many elements both are not 0, and on how many they agree."""
    present, product = np.int32(0), np.int32(0)
    for i in range(len(a)):
        p = np.int32(a[i] * b[i])
        product = np.int32(product + p)
        present = np.int32(present + np.int32(p * p))
    return np.int64(present), np.int64((present + product) // 2)


@part()
def count_mixed_tile(least, most):
    """On how many elements some sign is negative and another positive."""
    mixed = np.int32(0)
    for i in range(len(least)):
        mixed = np.int32(mixed + np.int32(most[i] & np.int32(-least[i])))
    return np.int64(mixed)


@part()
def relate_tile(rows, begin, length, signs, least, most, both, agree):
    """Count the signs of every row's tile that begins at `begin`, and of every pair of rows.

    Args:
        signs: int32 [rows, tile], scratch, as `least` and `most` [tile] are.
        both, agree: int64 [rows, rows]: elements that are not zero in two rows, and those of one
            sign; counts are added.

    Returns:
        elements on which some row is positive and another negative.
    """
    sources = len(rows)
    low, high = least[:length], most[:length]
    low[:] = 0
    high[:] = 0
    for s in range(sources):
        signs_tile(rows[s, begin : begin + length], signs[s, :length], low, high)
    for s in range(sources):
        for t in range(s, sources):
            present, same = count_pair_tile(signs[s, :length], signs[t, :length])
            both[s, t] += present
            agree[s, t] += same
            if s != t:
                both[t, s] += present
                agree[t, s] += same
    return count_mixed_tile(low, high)


@part(fastmath=_SUMS)
def dot_tile(a, b):
    """The dot product of two rows, in whatever order is quick: for the report."""
    total = F32(0.0)
    for i in range(len(a)):
        total += a[i] * b[i]
    return np.float64(total)


@part(fastmath=_SUMS)
def square_change_tile(base, merged):
    """sum of (merged - base)^2, in whatever order is quick: for the report."""
    total = F32(0.0)
    for i in range(len(base)):
        total += (merged[i] - base[i]) * (merged[i] - base[i])
    return np.float64(total)
