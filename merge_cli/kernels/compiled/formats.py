"""Storage formats: float32 from what is stored, and back."""

from __future__ import annotations

import numpy as np

from merge_cli.kernels.compiled.kernel import F32, INFINITY, MAGNITUDE, U32, kernel
from merge_cli.kernels.compiled.tiles import (
    BF16,
    F16,
    TILE,
    decode_tile,
    encode_tile,
    largest_key_tile,
    load_tile,
)


@kernel("boolean(u2[:, ::1], f4[:, ::1], f4[::1], boolean, boolean)")
def decode_bf16(raw, rows, base, has_base, deltas):
    """bfloat16 bits to float32; whether any is NaN or Inf.

    The first row of `raw` goes to `base` if there is one; the others to `rows`, less the base if
    `deltas`.
    """
    finite = True
    size = raw.shape[1]
    for begin in range(0, size, TILE):
        minus = base[begin : begin + TILE]
        for s in range(len(raw)):
            stored = raw[s, begin : begin + TILE].view(np.uint8)
            is_base = has_base and s == 0
            result = minus if is_base else rows[s - has_base, begin : begin + TILE]
            finite &= load_tile(stored, BF16, deltas and not is_base, minus, result)
    return not finite


@kernel("boolean(u2[::1], f4[::1])")
def decode_f16(raw, out):
    """float16 bits to float32; whether any is NaN or Inf."""
    finite = True
    for begin in range(0, len(raw), TILE):
        stored = raw[begin : begin + TILE].view(np.uint8)
        finite &= decode_tile(stored, F16, out[begin : begin + TILE])
    return not finite


@kernel("boolean(f4[::1])")
def non_finite(values):
    """Whether any is NaN or Inf."""
    return largest_key_tile(values) >= INFINITY


@kernel("void(f4[::1], u2[::1])")
def encode_bf16(values, raw):
    """float32 to bfloat16 bits, to nearest, ties to even; every NaN becomes 0x7FC0."""
    encode_tile(values, BF16, raw.view(np.uint8), values)


@kernel("boolean(f4[::1], u2[::1])")
def encode_f16(values, raw):
    """float32 to float16 bits, to nearest, ties to even; NaN becomes 0x7E00; whether any is Inf."""
    shifted = np.empty(TILE, np.float32)
    fits = True
    for begin in range(0, len(values), TILE):
        stored = raw[begin : begin + TILE].view(np.uint8)
        fits &= encode_tile(values[begin : begin + TILE], F16, stored, shifted)
    return not fits


@kernel("void(f4[:, ::1], i8, u1[:, ::1], f4[::1])")
def quantise(rows, wide, codes, scales):
    """float32 to E4M3 with a scale for each `wide` columns of these rows; see kernels/fp8.py."""
    quotient = np.empty(wide, np.float32)
    shifted = np.empty(wide, np.float32)
    quotient_bits, shifted_bits = quotient.view(np.uint32), shifted.view(np.uint32)
    for number in range(len(scales)):
        begin = number * wide
        largest = U32(0)
        for r in range(len(rows)):
            bits = rows[r, begin : begin + wide].view(np.uint32)
            for i in range(len(bits)):
                magnitude = bits[i] & MAGNITUDE
                largest = max(largest, magnitude if magnitude < INFINITY else U32(0))
        shifted_bits[0] = largest
        scale = max(shifted[0] / F32(448.0), F32(2.0**-126)) if largest else F32(1.0)
        scales[number] = scale
        for r in range(len(rows)):
            part, out = rows[r, begin : begin + wide], codes[r, begin : begin + wide]
            bits = part.view(np.uint32)
            for i in range(len(part)):
                quotient[i] = min(abs(part[i] / scale), F32(448.0))
                shifted[i] = quotient[i] + F32(16384.0)
            for i in range(len(part)):
                near = quotient_bits[i]
                odd = (near >> U32(20)) & U32(1)
                normal = ((near + U32(0x7FFFF) + odd) >> U32(20)) - U32(960)
                small = shifted_bits[i] - U32(0x46800000)
                code = small if near < U32(0x3C800000) else normal  # 2^-6
                code = code | ((bits[i] >> U32(24)) & U32(0x80))
                out[i] = np.uint8(code if (bits[i] & MAGNITUDE) < INFINITY else U32(0x7F))
