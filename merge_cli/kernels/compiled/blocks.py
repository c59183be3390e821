"""GGUF's blocks of codes to numbers: the twins of the decoders in formats/gguf/blocks.py.

Their docstrings say where a block has its fields. Here a block goes from its bytes to float32 in
one loop, with nothing between that would have to be written down and read again.
"""

from __future__ import annotations

import numpy as np

from merge_cli.kernels.compiled.kernel import (
    F32,
    INFINITY,
    U32,
    bits_of,
    float_of,
    kernel,
    part,
)

_U8 = np.uint8
_LOWER, _SIX = _U8(15), _U8(63)
_BLOCKS = "void(u1[:, ::1], f4[:, ::1])"


@part()
def half_at(block, at):
    """The float16 at a byte, as float32."""
    bits = U32(block[at]) | U32(U32(block[at + 1]) << U32(8))
    magnitude = U32(bits & U32(0x7FFF))
    scaled = bits_of(float_of(U32(magnitude << U32(13))) * F32(2.0**112))
    special = INFINITY if magnitude >= U32(0x7C00) else U32(0)
    return float_of(U32(scaled | special | U32((bits & U32(0x8000)) << U32(16))))


@part()
def nibbles_tile(raw, codes):
    """The lower four bits of all bytes, then the upper ones."""
    count = len(raw)
    upper = codes[count:]
    for i in range(count):
        codes[i] = raw[i] & _LOWER
        upper[i] = raw[i] >> _U8(4)


@part()
def fifth_tile(raw, codes):
    """Add a fifth bit to 32 codes, from four bytes."""
    bits = U32(raw[0]) | U32(raw[1]) << U32(8) | U32(raw[2]) << U32(16) | U32(raw[3]) << U32(24)
    for i in range(32):
        codes[i] |= _U8(U32(U32(bits >> U32(i)) & U32(1)) << U32(4))


@kernel(_BLOCKS)
def q8_0(raw, out):
    """Scale, 32 signed bytes."""
    for b in range(len(raw)):
        scale, numbers = half_at(raw[b], 0), out[b]
        codes = raw[b, 2:34].view(np.int8)
        for i in range(32):
            numbers[i] = scale * F32(codes[i])


@kernel(_BLOCKS)
def q4_0(raw, out):
    """Scale, 16 bytes of codes."""
    for b in range(len(raw)):
        scale = half_at(raw[b], 0)
        codes, lower, upper = raw[b, 2:18], out[b, :16], out[b, 16:32]
        for i in range(16):
            lower[i] = scale * (F32(_U8(codes[i] & _LOWER)) - F32(8.0))
            upper[i] = scale * (F32(_U8(codes[i] >> _U8(4))) - F32(8.0))


@kernel(_BLOCKS)
def q4_1(raw, out):
    """Scale and least number, 16 bytes of codes."""
    for b in range(len(raw)):
        scale, least = half_at(raw[b], 0), half_at(raw[b], 2)
        codes, lower, upper = raw[b, 4:20], out[b, :16], out[b, 16:32]
        for i in range(16):
            lower[i] = scale * F32(_U8(codes[i] & _LOWER)) + least
            upper[i] = scale * F32(_U8(codes[i] >> _U8(4))) + least


@kernel(_BLOCKS)
def q5_0(raw, out):
    """Scale, the fifth bits, 16 bytes of codes."""
    codes = np.empty(32, np.uint8)
    for b in range(len(raw)):
        nibbles_tile(raw[b, 6:22], codes)
        fifth_tile(raw[b, 2:6], codes)
        scale, numbers = half_at(raw[b], 0), out[b]
        for i in range(32):
            numbers[i] = scale * (F32(codes[i]) - F32(16.0))


@kernel(_BLOCKS)
def q5_1(raw, out):
    """Scale and least number, the fifth bits, 16 bytes of codes."""
    codes = np.empty(32, np.uint8)
    for b in range(len(raw)):
        nibbles_tile(raw[b, 8:24], codes)
        fifth_tile(raw[b, 4:8], codes)
        scale, least, numbers = half_at(raw[b], 0), half_at(raw[b], 2), out[b]
        for i in range(32):
            numbers[i] = scale * F32(codes[i]) + least


@kernel(_BLOCKS)
def q2_k(raw, out):
    """Scales and least numbers of 4 bits, codes of 2 bits, two floats for those."""
    for b in range(len(raw)):
        scale, least = half_at(raw[b], 80), half_at(raw[b], 82)
        for p in range(16):
            both = raw[b, p]
            part_scale = scale * F32(_U8(both & _LOWER))
            part_least = least * F32(_U8(both >> _U8(4)))
            first, shift = 16 + 32 * (p // 8) + 16 * (p % 2), _U8(2 * (p // 2 % 4))
            codes, numbers = raw[b, first : first + 16], out[b, 16 * p : 16 * p + 16]
            for i in range(16):
                code = _U8(_U8(codes[i] >> shift) & _U8(3))
                numbers[i] = part_scale * F32(code) - part_least


@kernel(_BLOCKS)
def q3_k(raw, out):
    """The third bits, codes of 2 bits, 16 scales of 6 bits, a float for those."""
    for b in range(len(raw)):
        scale = half_at(raw[b], 108)
        for p in range(16):
            lower = _U8(raw[b, 96 + p % 8] >> _U8(4 * (p // 8))) & _LOWER
            upper = _U8(_U8(raw[b, 104 + p % 4] >> _U8(2 * (p // 4))) & _U8(3))
            part_scale = scale * F32(np.int32(lower) + 16 * np.int32(upper) - 32)
            first, shift = 32 + 32 * (p // 8) + 16 * (p % 2), _U8(2 * (p // 2 % 4))
            codes, numbers = raw[b, first : first + 16], out[b, 16 * p : 16 * p + 16]
            third, bit = raw[b, 16 * (p % 2) : 16 * (p % 2) + 16], _U8(p // 2)
            for i in range(16):
                code = _U8(_U8(codes[i] >> shift) & _U8(3))
                code |= _U8(_U8(_U8(third[i] >> bit) & _U8(1)) << _U8(2))
                numbers[i] = part_scale * (F32(code) - F32(4.0))


@part()
def packed_scale(packed, p):
    """The p-th of eight scales of 6 bits."""
    if p < 4:
        return F32(_U8(packed[p] & _SIX))
    return F32(_U8((packed[p + 4] & _LOWER) | _U8(_U8(packed[p - 4] >> _U8(6)) << _U8(4))))


@part()
def packed_least(packed, p):
    """The p-th of eight least numbers of 6 bits."""
    if p < 4:
        return F32(_U8(packed[p + 4] & _SIX))
    return F32(_U8(_U8(packed[p + 4] >> _U8(4)) | _U8(_U8(packed[p] >> _U8(6)) << _U8(4))))


@kernel(_BLOCKS)
def q4_k(raw, out):
    """Two floats for 8 scales and 8 least numbers, those in 12 bytes, codes of 4 bits."""
    for b in range(len(raw)):
        scale, least, packed = half_at(raw[b], 0), half_at(raw[b], 2), raw[b, 4:16]
        for p in range(8):
            part_scale, part_least = (
                scale * packed_scale(packed, p),
                least * packed_least(packed, p),
            )
            first, shift = 16 + 32 * (p // 2), _U8(4 * (p % 2))
            codes, numbers = raw[b, first : first + 32], out[b, 32 * p : 32 * p + 32]
            for i in range(32):
                code = _U8(_U8(codes[i] >> shift) & _LOWER)
                numbers[i] = part_scale * F32(code) - part_least


@kernel(_BLOCKS)
def q5_k(raw, out):
    """As `q4_k`, with the fifth bits between scales and codes."""
    for b in range(len(raw)):
        scale, least, packed = half_at(raw[b], 0), half_at(raw[b], 2), raw[b, 4:16]
        fifth = raw[b, 16:48]
        for p in range(8):
            part_scale, part_least = (
                scale * packed_scale(packed, p),
                least * packed_least(packed, p),
            )
            first, shift, bit = 48 + 32 * (p // 2), _U8(4 * (p % 2)), _U8(p)
            codes, numbers = raw[b, first : first + 32], out[b, 32 * p : 32 * p + 32]
            for i in range(32):
                code = _U8(_U8(codes[i] >> shift) & _LOWER)
                code |= _U8(_U8(_U8(fifth[i] >> bit) & _U8(1)) << _U8(4))
                numbers[i] = part_scale * F32(code) - part_least


@kernel(_BLOCKS)
def q6_k(raw, out):
    """The lower four bits of the codes, the upper two, 16 signed scales, a float for those."""
    for b in range(len(raw)):
        scale, scales = half_at(raw[b], 208), raw[b, 192:208].view(np.int8)
        for p in range(16):
            part_scale = scale * F32(scales[p])
            # A part has 16 of the 128 codes of its half; 64 bytes have two nibbles each.
            half, inside = p // 8, p % 8
            first, shift = 64 * half + 16 * (inside % 4), _U8(4 * (inside // 4))
            second, up = 128 + 32 * half + 16 * (inside % 2), _U8(2 * (inside // 2))
            lower, upper = raw[b, first : first + 16], raw[b, second : second + 16]
            numbers = out[b, 16 * p : 16 * p + 16]
            for i in range(16):
                code = _U8(_U8(lower[i] >> shift) & _LOWER)
                code |= _U8(_U8(_U8(upper[i] >> up) & _U8(3)) << _U8(4))
                numbers[i] = part_scale * (F32(code) - F32(32.0))
