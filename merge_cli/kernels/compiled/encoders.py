"""Codes of eight and four bits from float32, with scales by groups; see kernels/quantise.py."""

from __future__ import annotations

import numpy as np

from merge_cli.kernels.compiled.arrays import as_words, new_f32, new_u8
from merge_cli.kernels.compiled.instructions import bits_of, float_of
from merge_cli.kernels.compiled.kernel import CHUNK, F32, INFINITY, MAGNITUDE, U32, kernel
from merge_cli.kernels.compiled.parts import part

_SIGN = np.int32(-(2**31))
_ROUND = F32(12582912.0)  # 1.5 * 2^23: adding it leaves whole numbers, nearest, ties to even


@kernel("void(f4[:, ::1], i8, i8, f4[:, ::1])")
def block_largest(rows, tall, wide, largest):
    """The largest finite magnitude of each block of `tall` x `wide`."""
    across = largest.shape[1]
    for first in range(0, len(rows), tall):
        for number in range(across):
            begin = number * wide
            best = U32(0)
            for r in range(first, min(first + tall, len(rows))):
                bits = as_words(rows[r, begin : begin + wide])
                for i in range(len(bits)):
                    magnitude = bits[i] & MAGNITUDE
                    best = max(best, magnitude if magnitude < INFINITY else U32(0))
            largest.view(np.uint32)[first // tall, number] = best


@part()
def encode_blocks(rows, tall, wide, scales, codes, fraction, bias, largest, infinite, nan_from):
    """value / scale of its block as a sign, an exponent with this bias and so many fraction bits.

    Args:
        largest: number of the format; what is beyond becomes it.
        infinite: the code of Inf.
        nan_from: bits of |value| from which on it becomes NaN, 0x7F.
    """
    quotient = new_f32(CHUNK)
    shifted = new_f32(CHUNK)
    quotient_bits, shifted_bits = as_words(quotient), as_words(shifted)
    columns = rows.shape[1]
    shift, odd_bit = U32(23 - fraction), U32(1)
    half = U32((1 << (22 - fraction)) - 1)
    rebias = U32((127 - bias) << fraction)
    least = U32((128 - bias) << 23)  # bits of the smallest number that is normal
    # A float32's last place at this number is the format's smallest: adding it rounds to that.
    moved_bits = U32((151 - bias - fraction) << 23)
    moved = float_of(moved_bits)
    for r in range(len(rows)):
        for number in range(scales.shape[1]):
            scale = scales[r // tall, number]
            end = min((number + 1) * wide, columns)
            for begin in range(number * wide, end, CHUNK):
                values = rows[r, begin : min(begin + CHUNK, end)]
                out = codes[r, begin : min(begin + CHUNK, end)]
                bits = as_words(values)
                for i in range(len(values)):
                    quotient[i] = min(abs(values[i] / scale), largest)
                    shifted[i] = quotient[i] + moved
                for i in range(len(values)):
                    near = quotient_bits[i]
                    odd = U32(U32(near >> shift) & odd_bit)
                    normal = U32(U32(U32(U32(near + half) + odd) >> shift) - rebias)
                    small = U32(shifted_bits[i] - moved_bits)
                    code = small if near < least else normal
                    key = U32(bits[i] & MAGNITUDE)
                    code = infinite if key == INFINITY else code
                    code = U32(code | U32(U32(bits[i] >> U32(24)) & U32(0x80)))
                    code = U32(0x7F) if key >= nan_from else code
                    out[i] = np.uint8(code)


@kernel("void(f4[:, ::1], i8, i8, f4[:, ::1], u1[:, ::1])")
def encode_e4m3(rows, tall, wide, scales, codes):
    """The E4M3 number nearest to value / scale of its block; NaN and Inf become NaN."""
    encode_blocks(rows, tall, wide, scales, codes, 3, 7, F32(448.0), U32(0x7F), INFINITY)


@kernel("void(f4[:, ::1], i8, i8, f4[:, ::1], u1[:, ::1])")
def encode_e5m2(rows, tall, wide, scales, codes):
    """The E5M2 number nearest to value / scale of its block; it has Inf."""
    nan = U32(INFINITY + U32(1))
    encode_blocks(rows, tall, wide, scales, codes, 2, 15, F32(57344.0), U32(0x7C), nan)


@kernel("void(f4[:, ::1], f4[::1], f4[::1])")
def group_extremes(values, above, below):
    """How far each group reaches above and below zero; no finite number where one is not."""
    above_bits, below_bits = above.view(np.int32), below.view(np.int32)
    flat, size = values.reshape(-1).view(np.int32), values.shape[1]
    for g in range(len(values)):
        bits = flat[g * size : (g + 1) * size]
        high, low = np.int32(0), np.int32(0)
        for i in range(len(bits)):
            # As whole numbers, floats above zero are in their order and those below are less.
            high = max(high, bits[i])
            low = max(low, bits[i] ^ _SIGN)
        above_bits[g], below_bits[g] = high, low


@kernel("void(f4[:, ::1], f4[::1], u1[:, ::1])")
def encode_e2m1(values, scales, codes):
    """The E2M1 numbers nearest to value / scale of the group, two in a byte."""
    count, size = values.shape
    batch = max(1, CHUNK // size)  # groups; short ones would end every loop at once
    quotient = new_f32(batch * size)
    single = new_u8(batch * size)
    flat, out = values.reshape(-1), codes.reshape(-1)
    for first in range(0, count, batch):
        here = min(batch, count - first)
        part = flat[first * size : (first + here) * size]
        packed = out[first * size // 2 : (first + here) * size // 2]
        bits = as_words(part)
        for g in range(here):
            scale, group = scales[first + g], values[first + g]
            target = quotient[g * size : (g + 1) * size]
            for i in range(len(group)):
                target[i] = abs(group[i] / scale)
        for i in range(len(part)):
            q = quotient[i]
            code = (
                U32(q > F32(0.25))
                + U32(q >= F32(0.75))
                + U32(q > F32(1.25))
                + U32(q >= F32(1.75))
                + U32(q > F32(2.5))
                + U32(q >= F32(3.5))
                + U32(q > F32(5.0))
            )
            single[i] = np.uint8(code | ((bits[i] >> U32(28)) & U32(8)))
        for i in range(len(packed)):
            packed[i] = single[2 * i] | (single[2 * i + 1] << 4)


@kernel("void(f4[:, ::1], f4[::1], f4[::1], u1[:, ::1])")
def encode_int4(values, scales, zeros, codes):
    """value / scale + zero of the group as a whole number from -8 on, two in a byte."""
    count, size = values.shape
    batch = max(1, CHUNK // size)
    moved = new_f32(batch * size)
    single = new_u8(batch * size)
    moved_bits = as_words(moved)
    flat, out = values.reshape(-1), codes.reshape(-1)
    for first in range(0, count, batch):
        here = min(batch, count - first)
        part = flat[first * size : (first + here) * size]
        packed = out[first * size // 2 : (first + here) * size // 2]
        for g in range(here):
            scale, zero, group = scales[first + g], zeros[first + g], values[first + g]
            target = moved[g * size : (g + 1) * size]
            for i in range(len(group)):
                target[i] = group[i] / scale + zero
        for i in range(len(part)):
            q = moved[i]
            q = q if q < F32(7.0) else F32(7.0)
            q = q if q > F32(-8.0) else F32(-8.0)
            moved[i] = q + _ROUND
        for i in range(len(part)):
            single[i] = np.uint8((moved_bits[i] + U32(8)) & U32(15))
        for i in range(len(packed)):
            packed[i] = single[2 * i] | (single[2 * i + 1] << 4)


@kernel("void(f4[:, ::1], f4[::1], f4[::1], f4, u1[:, ::1])")
def encode_affine(values, scales, biases, largest, codes):
    """(value - bias) / scale of the group as a whole number from 0 to `largest`."""
    flat, out = values.reshape(-1), codes.reshape(-1)
    size = values.shape[1]
    for g in range(len(values)):
        scale, bias = scales[g], biases[g]
        group, target = flat[g * size : (g + 1) * size], out[g * size : (g + 1) * size]
        for i in range(len(target)):
            q = (group[i] - bias) / scale
            q = q if q > F32(0.0) else F32(0.0)
            q = q if q < largest else largest
            target[i] = np.uint8(bits_of(q + _ROUND) & U32(0xFF))
