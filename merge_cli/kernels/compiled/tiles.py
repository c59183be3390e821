"""What kernels are made of: parts that work on one tile, about a thousand elements in cache.

A fused loop decodes, changes and encodes a tile while it lies there. Kernels over whole blocks are
made of the same parts, so that the bits are the same.

numba widens sums and products of 32-bit numbers to 64 bits, and a vector then holds half as many:
they are cut back at each step.
"""

from __future__ import annotations

import numpy as np

from merge_cli.kernels.compiled.kernel import (
    F32,
    INFINITY,
    MAGNITUDE,
    U32,
    bits_of,
    float_of,
    part,
)

TILE = 1024  # float32: six rows of it stay in the L1 cache
# How a stored element is encoded.
BF16, F16, FLOAT32 = 0, 1, 2
# What a disjoint mean is divided by.
NOTHING, WEIGHTS, COUNT = 0, 1, 2
_U16 = np.uint16
_SUMS = {"reassoc", "nsz"}


@part()
def tile_of(stored, start, kind, begin, length):
    """The stored bytes of elements [begin, begin + length) of a tensor that begins at `start`."""
    width = 4 if kind == FLOAT32 else 2
    first = start + begin * width
    return stored[first : first + length * width]


@part()
def decode_tile(stored, kind, row):
    """Stored bytes to float32; whether all are finite.

    The largest magnitude is looked for among the 16 bits as they are stored: twice as many fit into
    a vector as of float32.
    """
    if kind == BF16:
        halves = stored.view(np.uint16)
        largest = _U16(0)
        for i in range(len(halves)):
            largest = max(largest, _U16(halves[i] & _U16(0x7FFF)))
            row[i] = float_of(U32(U32(halves[i]) << U32(16)))
        return largest < _U16(0x7F80)
    if kind == F16:
        # Moved into float32's place and scaled by 2^112, which also makes subnormals right.
        halves = stored.view(np.uint16)
        largest = _U16(0)
        for i in range(len(halves)):
            magnitude = _U16(halves[i] & _U16(0x7FFF))
            largest = max(largest, magnitude)
            scaled = bits_of(float_of(U32(U32(magnitude) << U32(13))) * F32(2.0**112))
            special = INFINITY if magnitude >= _U16(0x7C00) else U32(0)
            sign = U32(U32(halves[i] & _U16(0x8000)) << U32(16))
            row[i] = float_of(U32(scaled | special | sign))
        return largest < _U16(0x7C00)
    wide, bits = stored.view(np.uint32), row.view(np.uint32)
    most = U32(0)
    for i in range(len(wide)):
        most = max(most, U32(wide[i] & MAGNITUDE))
        bits[i] = wide[i]
    return most < INFINITY


@part()
def load_tile(stored, kind, is_delta, base, row):
    """`decode_tile`, less the base if `is_delta`. Kernels have one call: each compiles it anew."""
    if kind == BF16 and is_delta:
        halves = stored.view(np.uint16)
        largest = _U16(0)
        for i in range(len(halves)):
            largest = max(largest, _U16(halves[i] & _U16(0x7FFF)))
            row[i] = float_of(U32(U32(halves[i]) << U32(16))) - base[i]
        return largest < _U16(0x7F80)
    finite = decode_tile(stored, kind, row)
    if is_delta:
        for i in range(len(row)):
            row[i] = row[i] - base[i]
    return finite


@part()
def add_bf16_tile(stored, weight, is_first, total):
    """total += weight * what is stored as bfloat16; whether all of it is finite."""
    halves = stored.view(np.uint16)
    largest = _U16(0)
    if is_first:
        for i in range(len(halves)):
            largest = max(largest, _U16(halves[i] & _U16(0x7FFF)))
            total[i] = float_of(U32(U32(halves[i]) << U32(16))) * weight
    else:
        for i in range(len(halves)):
            largest = max(largest, _U16(halves[i] & _U16(0x7FFF)))
            total[i] = total[i] + float_of(U32(U32(halves[i]) << U32(16))) * weight
    return largest < _U16(0x7F80)


@part()
def encode_tile(values, kind, stored, shifted):
    """float32 to stored bytes, to nearest, ties to even; whether no float16 is Inf.

    NaN becomes 0x7FC0 (bfloat16) or 0x7E00 (float16). Small float16 are rounded by adding 0.5,
    whose last place is that of a float16 subnormal; `shifted` is a row of scratch for that.
    """
    bits = values.view(np.uint32)
    if kind == BF16:
        halves = stored.view(np.uint16)
        for i in range(len(bits)):
            wide = bits[i]
            rounded = U32(U32(wide + U32(0x7FFF)) + U32((wide >> U32(16)) & U32(1))) >> U32(16)
            nan = (wide & MAGNITUDE) > INFINITY
            halves[i] = _U16(U32(0x7FC0) if nan else rounded)
        return True
    if kind == F16:
        halves = stored.view(np.uint16)
        shifted_bits = shifted.view(np.uint32)
        largest = U32(0)
        for i in range(len(bits)):
            shifted[i] = abs(values[i]) + F32(0.5)
        for i in range(len(bits)):
            wide = U32(bits[i] & MAGNITUDE)
            odd = U32((wide >> U32(13)) & U32(1))
            normal = U32(U32(wide + U32(0xC8000FFF)) + odd) >> U32(13)
            small = U32(shifted_bits[i] - U32(0x3F000000))
            half = small if wide < U32(0x38800000) else normal
            half = U32(0x7C00) if wide >= U32(0x477FF000) else half
            half = U32(0x7E00) if wide > INFINITY else half
            halves[i] = _U16(half | ((bits[i] >> U32(16)) & U32(0x8000)))
            largest = max(largest, wide)
        return largest < U32(0x477FF000)
    wide_out = stored.view(np.uint32)
    for i in range(len(bits)):
        wide_out[i] = bits[i]
    return True


@part()
def add_weighted_tile(row, weight, is_first, total):
    """total += weight * row: a product, then a sum, each rounded."""
    if is_first:
        for i in range(len(row)):
            total[i] = row[i] * weight
    else:
        for i in range(len(row)):
            total[i] = total[i] + row[i] * weight


@part()
def scale_tile(row, factor):
    """row *= factor."""
    for i in range(len(row)):
        row[i] = row[i] * factor


@part()
def divide_tile(total, divisor):
    """total /= divisor."""
    for i in range(len(total)):
        total[i] = total[i] / divisor


@part()
def add_base_tile(base, scale, total):
    """total = base + scale * total: a product, then a sum, each rounded."""
    for i in range(len(total)):
        total[i] = base[i] + scale * total[i]


@part()
def mixed_word(index, k0, k1):
    """The random word of one element: see `kernels.mask`, which writes the generator down."""
    x = index ^ k0
    x = U32(U32(x ^ (x >> U32(16))) * U32(0x21F0AAAD))
    x = U32(U32(x ^ (x >> U32(15))) + k1)
    x = U32(x * U32(0xD35A2D97))
    x = U32(U32(x ^ (x >> U32(15))) * U32(0x31848BAB))
    return U32(x ^ (x >> U32(14)))


@part()
def drop_tile(row, k0, k1, limit, low, factor):
    """row * factor where an element's word is below the limit, else 0."""
    for i in range(len(row)):
        word = mixed_word(U32(low + U32(i)), k0, k1)
        row[i] = row[i] * factor if word < limit else F32(0.0)


@part()
def count_words_tile(size, k0, k1, limit, low):
    """How many elements of a tile `drop_tile` keeps."""
    kept = U32(0)
    for i in range(size):
        kept = U32(kept + U32(mixed_word(U32(low + U32(i)), k0, k1) < limit))
    return np.int64(kept)


@part()
def trim_tile(row, threshold, ties, factor):
    """Keys above the threshold, or equal to it among the first `ties`; else 0. Times the factor."""
    bits = row[:ties].view(np.uint32)
    for i in range(len(bits)):
        key = U32(bits[i] & MAGNITUDE)
        bits[i] = bits[i] if (key >= threshold) & (key <= INFINITY) else U32(0)
    bits = row[ties:].view(np.uint32)
    for i in range(len(bits)):
        key = U32(bits[i] & MAGNITUDE)
        bits[i] = bits[i] if (key > threshold) & (key <= INFINITY) else U32(0)
    if factor != F32(1.0):
        for i in range(len(row)):
            row[i] = row[i] * factor


@part()
def count_trimmed_tile(row, threshold, ties):
    """How many elements of a tile `trim_tile` keeps."""
    kept = U32(0)
    bits = row[:ties].view(np.uint32)
    for i in range(len(bits)):
        key = U32(bits[i] & MAGNITUDE)
        kept = U32(kept + U32((key >= threshold) & (key <= INFINITY)))
    bits = row[ties:].view(np.uint32)
    for i in range(len(bits)):
        key = U32(bits[i] & MAGNITUDE)
        kept = U32(kept + U32((key > threshold) & (key <= INFINITY)))
    return np.int64(kept)


@part()
def elect_tile(
    rows, begin, weights, weighted, divide_by, zero_sign, least_divisor, elected, divisor, total
):
    """The disjoint mean of rows[:, begin : begin + len(total)]: see `kernels.elect.disjoint_mean`.

    Args:
        elected, divisor: scratch.
    """
    sources, length = len(rows), len(total)
    unit_vote = F32(1.0)
    for s in range(sources):
        row = rows[s, begin : begin + length]
        vote = weights[s] if weighted else unit_vote
        if s == 0:
            for i in range(length):
                elected[i] = row[i] * vote
        else:
            for i in range(length):
                elected[i] = elected[i] + row[i] * vote
    for i in range(length):
        sign = zero_sign
        sign = unit_vote if elected[i] > 0 else sign
        sign = -unit_vote if elected[i] < 0 else sign
        elected[i] = sign
        total[i] = F32(0.0)
        divisor[i] = F32(0.0)
    for s in range(sources):
        row, weight = rows[s, begin : begin + length], weights[s]
        vote = weight if weighted else unit_vote
        share = unit_vote if divide_by == COUNT else weight
        if divide_by == NOTHING:
            for i in range(length):
                agrees = (row[i] * vote) * elected[i] > 0
                total[i] = total[i] + (row[i] * weight if agrees else F32(0.0))
        else:
            for i in range(length):
                agrees = (row[i] * vote) * elected[i] > 0
                total[i] = total[i] + (row[i] * weight if agrees else F32(0.0))
                divisor[i] = divisor[i] + (share if agrees else F32(0.0))
    if divide_by == NOTHING:
        return
    if least_divisor > 0:
        for i in range(length):
            safe = least_divisor if divisor[i] < least_divisor else divisor[i]
            total[i] = total[i] / safe
    else:
        for i in range(length):
            safe = unit_vote if abs(divisor[i]) < F32(1e-8) else divisor[i]
            total[i] = total[i] / safe


@part()
def count_range_tile(row, low, high, shift, offsets, inside, counts):
    """`magnitudes.count_range` of a tile; `offsets` and `inside` are rows of scratch."""
    bits = row.view(np.uint32)
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
    bits = row.view(np.uint32)
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
    bits = row.view(np.uint32)
    equal = U32(0)
    for i in range(len(bits)):
        equal = U32(equal + U32(U32(bits[i] & MAGNITUDE) == threshold))
    return np.int64(equal)


@part()
def largest_key_tile(row):
    """The largest key (bits of |x|)."""
    bits = row.view(np.uint32)
    largest = U32(0)
    for i in range(len(bits)):
        largest = max(largest, U32(bits[i] & MAGNITUDE))
    return largest


@part()
def signs_tile(row, sign, least, most):
    """The signs of a row, and of each element the least and the largest that there was."""
    for i in range(len(row)):
        value = np.int32(np.int32(row[i] > 0) - np.int32(row[i] < 0))
        sign[i] = value
        least[i] = min(least[i], value)
        most[i] = max(most[i], value)


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
