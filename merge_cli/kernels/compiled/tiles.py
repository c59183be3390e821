"""What kernels are made of: parts that change one tile, about a thousand elements in cache.

A fused loop decodes, changes and encodes a tile while it lies there. Kernels over whole blocks are
made of the same parts, so that the bits are the same.

numba widens sums and products of 32-bit numbers to 64 bits, and a vector then holds half as many:
they are cut back at each step.
"""

from __future__ import annotations

import numpy as np

from merge_cli.kernels.compiled.arrays import as_halves, as_words
from merge_cli.kernels.compiled.instructions import bits_of, float_of
from merge_cli.kernels.compiled.kernel import F32, INFINITY, MAGNITUDE, U32
from merge_cli.kernels.compiled.parts import part

TILE = 1024  # float32: six rows of it stay in the L1 cache
# How a stored element is encoded.
BF16, F16, FLOAT32 = 0, 1, 2
# What a disjoint mean is divided by.
NOTHING, WEIGHTS, COUNT = 0, 1, 2
_U16 = np.uint16


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
        halves = as_halves(stored)
        largest = _U16(0)
        for i in range(len(halves)):
            magnitude = _U16(halves[i] & _U16(0x7FFF))
            largest = magnitude if magnitude > largest else largest
            row[i] = float_of(U32(U32(halves[i]) << U32(16)))
        return largest < _U16(0x7F80)
    if kind == F16:
        # Moved into float32's place and scaled by 2^112, which also makes subnormals right.
        halves = as_halves(stored)
        largest = _U16(0)
        for i in range(len(halves)):
            magnitude = _U16(halves[i] & _U16(0x7FFF))
            largest = magnitude if magnitude > largest else largest
            scaled = bits_of(float_of(U32(U32(magnitude) << U32(13))) * F32(2.0**112))
            special = INFINITY if magnitude >= _U16(0x7C00) else U32(0)
            sign = U32(U32(halves[i] & _U16(0x8000)) << U32(16))
            row[i] = float_of(U32(scaled | special | sign))
        return largest < _U16(0x7C00)
    wide, bits = as_words(stored), as_words(row)
    most = U32(0)
    for i in range(len(wide)):
        magnitude = U32(wide[i] & MAGNITUDE)
        most = magnitude if magnitude > most else most
        bits[i] = wide[i]
    return most < INFINITY


@part()
def load_tile(stored, kind, is_delta, base, row):
    """`decode_tile`, less the base if `is_delta`. Kernels have one call: each compiles it anew."""
    if kind == BF16 and is_delta:
        halves = as_halves(stored)
        largest = _U16(0)
        for i in range(len(halves)):
            magnitude = _U16(halves[i] & _U16(0x7FFF))
            largest = magnitude if magnitude > largest else largest
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
    halves = as_halves(stored)
    largest = _U16(0)
    if is_first:
        for i in range(len(halves)):
            magnitude = _U16(halves[i] & _U16(0x7FFF))
            largest = magnitude if magnitude > largest else largest
            total[i] = float_of(U32(U32(halves[i]) << U32(16))) * weight
    else:
        for i in range(len(halves)):
            magnitude = _U16(halves[i] & _U16(0x7FFF))
            largest = magnitude if magnitude > largest else largest
            total[i] = total[i] + float_of(U32(U32(halves[i]) << U32(16))) * weight
    return largest < _U16(0x7F80)


@part()
def encode_tile(values, kind, stored, shifted):
    """float32 to stored bytes, to nearest, ties to even; whether no float16 is Inf.

    NaN becomes 0x7FC0 (bfloat16) or 0x7E00 (float16). Small float16 are rounded by adding 0.5,
    whose last place is that of a float16 subnormal; `shifted` is a row of scratch for that.
    """
    bits = as_words(values)
    if kind == BF16:
        halves = as_halves(stored)
        for i in range(len(bits)):
            wide = bits[i]
            rounded = U32(U32(wide + U32(0x7FFF)) + U32((wide >> U32(16)) & U32(1))) >> U32(16)
            nan = (wide & MAGNITUDE) > INFINITY
            halves[i] = _U16(U32(0x7FC0) if nan else rounded)
        return True
    if kind == F16:
        halves = as_halves(stored)
        shifted_bits = as_words(shifted)
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
            largest = wide if wide > largest else largest
        return largest < U32(0x477FF000)
    wide_out = as_words(stored)
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
def trim_tile(row, threshold, ties, factor):
    """Keys above the threshold, or equal to it among the first `ties`; else 0. Times the factor."""
    bits = as_words(row[:ties])
    for i in range(len(bits)):
        key = U32(bits[i] & MAGNITUDE)
        bits[i] = bits[i] if (key >= threshold) & (key <= INFINITY) else U32(0)
    bits = as_words(row[ties:])
    for i in range(len(bits)):
        key = U32(bits[i] & MAGNITUDE)
        bits[i] = bits[i] if (key > threshold) & (key <= INFINITY) else U32(0)
    if factor != F32(1.0):
        for i in range(len(row)):
            row[i] = row[i] * factor


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
