"""Storage formats: float32 from what is stored, and back."""

from __future__ import annotations

import numpy as np

from merge_cli.kernels.compiled.kernel import CHUNK, F32, INFINITY, MAGNITUDE, U32, kernel


@kernel("boolean(u2[:, ::1], f4[:, ::1], f4[::1], boolean, boolean)")
def decode_bf16(raw, rows, base, has_base, deltas):
    """bfloat16 bits to float32; whether any is NaN or Inf.

    The first row of `raw` goes to `base` if there is one; the others to `rows`, less the base if
    `deltas`.
    """
    largest = U32(0)
    size = raw.shape[1]
    for begin in range(0, size, CHUNK):
        minus = base[begin : begin + CHUNK]
        for s in range(len(raw)):
            halves = raw[s, begin : begin + CHUNK]
            is_base = has_base and s == 0
            result = minus if is_base else rows[s - has_base, begin : begin + CHUNK]
            bits = result.view(np.uint32)
            for i in range(len(halves)):
                wide = U32(halves[i]) << U32(16)
                bits[i] = wide
                largest = max(largest, wide & MAGNITUDE)
            if deltas and not is_base:
                for i in range(len(halves)):
                    result[i] = result[i] - minus[i]
    return largest >= INFINITY


@kernel("boolean(u2[::1], f4[::1])")
def decode_f16(raw, out):
    """float16 bits to float32; whether any is NaN or Inf.

    Moved into float32's place and scaled by 2^112, which also makes subnormals right.
    """
    bits = out.view(np.uint32)
    scale = F32(2.0**112)
    largest = U32(0)
    for i in range(len(raw)):
        magnitude = U32(raw[i]) & U32(0x7FFF)
        bits[i] = magnitude << U32(13)
        largest = max(largest, magnitude)
    for i in range(len(raw)):
        out[i] = out[i] * scale
    for i in range(len(raw)):
        half = U32(raw[i])
        special = INFINITY if (half & U32(0x7C00)) == U32(0x7C00) else U32(0)
        bits[i] = bits[i] | special | ((half & U32(0x8000)) << U32(16))
    return largest >= U32(0x7C00)


@kernel("boolean(f4[::1])")
def non_finite(values):
    """Whether any is NaN or Inf."""
    bits = values.view(np.uint32)
    largest = U32(0)
    for i in range(len(bits)):
        largest = max(largest, bits[i] & MAGNITUDE)
    return largest >= INFINITY


@kernel("void(f4[::1], u2[::1])")
def encode_bf16(values, raw):
    """float32 to bfloat16 bits, to nearest, ties to even; every NaN becomes 0x7FC0."""
    bits = values.view(np.uint32)
    for i in range(len(bits)):
        wide = bits[i]
        rounded = (wide + U32(0x7FFF) + ((wide >> U32(16)) & U32(1))) >> U32(16)
        nan = (wide & MAGNITUDE) > INFINITY
        raw[i] = np.uint16(U32(0x7FC0) if nan else rounded)


@kernel("boolean(f4[::1], u2[::1])")
def encode_f16(values, raw):
    """float32 to float16 bits, to nearest, ties to even; NaN becomes 0x7E00; whether any is Inf.

    Small ones are rounded by adding 0.5, whose last place is that of a float16 subnormal.
    """
    shifted = np.empty(CHUNK, np.float32)
    shifted_bits = shifted.view(np.uint32)
    largest = U32(0)
    for begin in range(0, len(values), CHUNK):
        part, halves = values[begin : begin + CHUNK], raw[begin : begin + CHUNK]
        bits = part.view(np.uint32)
        for i in range(len(part)):
            shifted[i] = abs(part[i]) + F32(0.5)
        for i in range(len(part)):
            wide = bits[i] & MAGNITUDE
            odd = (wide >> U32(13)) & U32(1)
            normal = (wide + U32(0xC8000FFF) + odd) >> U32(13)
            small = shifted_bits[i] - U32(0x3F000000)
            half = small if wide < U32(0x38800000) else normal  # 2^-14
            half = U32(0x7C00) if wide >= U32(0x477FF000) else half  # rounds to 65536 or more
            half = U32(0x7E00) if wide > INFINITY else half
            halves[i] = np.uint16(half | ((bits[i] >> U32(16)) & U32(0x8000)))
            largest = max(largest, wide)
    return largest >= U32(0x477FF000)
