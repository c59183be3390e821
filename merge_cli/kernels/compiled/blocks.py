"""GGUF's blocks of codes to numbers: the twins of the decoders in formats/gguf/blocks.py.

Their docstrings say where a block has its fields. Here a block goes from its bytes to float32 with
nothing between but the codes of one block. Loops run over parts of flat arrays, as far as `len` of
the part that is written: those become vectors without a look at what may overlap.
"""

from __future__ import annotations

import numpy as np

from merge_cli.kernels.compiled.kernel import F32, INFINITY, U32, kernel
from merge_cli.kernels.compiled.parts import bits_of, float_of, new_f32, new_u8, part

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
    lower, upper = codes[: len(raw)], codes[len(raw) : 2 * len(raw)]
    for i in range(len(lower)):
        lower[i] = raw[i] & _LOWER
    for i in range(len(upper)):
        upper[i] = raw[i] >> _U8(4)


@part()
def word_at(raw, at):
    """Four bytes as a whole number."""
    first, second = U32(raw[at]), U32(raw[at + 1])
    third, last = U32(raw[at + 2]), U32(raw[at + 3])
    return U32(first | second << U32(8) | third << U32(16) | last << U32(24))


@part()
def with_fifth(code, bits, i):
    """A code of four bits with the i-th bit of a word as its fifth: a whole number."""
    fifth = U32(U32(bits >> (U32(i) & U32(31))) & U32(1))
    return np.int32(U32(code) | U32(fifth << U32(4)))


@part()
def fill_tile(numbers, number):
    """The same number in all elements."""
    for i in range(len(numbers)):
        numbers[i] = number


@part()
def two_bits_tile(raw, codes):
    """128 codes of two bits from 32 bytes: all lowest ones, then all next ones."""
    for k in range(4):
        part_codes, shift = codes[32 * k : 32 * k + 32], _U8(2 * k)
        for i in range(len(part_codes)):
            part_codes[i] = _U8(_U8(raw[i] >> shift) & _U8(3))


@kernel(_BLOCKS)
def q8_0(raw, out):
    """Scale, 32 signed bytes."""
    flat, all_numbers = raw.reshape(-1), out.reshape(-1)
    for b in range(len(raw)):
        scale = half_at(raw[b], 0)
        codes, numbers = flat[34 * b + 2 : 34 * b + 34], all_numbers[32 * b : 32 * b + 32]
        for i in range(len(numbers)):
            numbers[i] = scale * F32(np.int8(codes[i]))


@kernel(_BLOCKS)
def q4_0(raw, out):
    """Scale, 16 bytes of codes."""
    flat, all_numbers = raw.reshape(-1), out.reshape(-1)
    for b in range(len(raw)):
        scale = half_at(raw[b], 0)
        codes, numbers = flat[18 * b + 2 : 18 * b + 18], all_numbers[32 * b : 32 * b + 32]
        lower, upper = numbers[:16], numbers[16:]
        for i in range(len(lower)):
            lower[i] = scale * (F32(_U8(codes[i] & _LOWER)) - F32(8.0))
        for i in range(len(upper)):
            upper[i] = scale * (F32(_U8(codes[i] >> _U8(4))) - F32(8.0))


@kernel(_BLOCKS)
def q4_1(raw, out):
    """Scale and least number, 16 bytes of codes."""
    flat, all_numbers = raw.reshape(-1), out.reshape(-1)
    for b in range(len(raw)):
        scale, least = half_at(raw[b], 0), half_at(raw[b], 2)
        codes, numbers = flat[20 * b + 4 : 20 * b + 20], all_numbers[32 * b : 32 * b + 32]
        lower, upper = numbers[:16], numbers[16:]
        for i in range(len(lower)):
            lower[i] = scale * F32(_U8(codes[i] & _LOWER)) + least
        for i in range(len(upper)):
            upper[i] = scale * F32(_U8(codes[i] >> _U8(4))) + least


@kernel(_BLOCKS)
def q5_0(raw, out):
    """Scale, the fifth bits, 16 bytes of codes."""
    codes, flat, all_numbers = new_u8(32), raw.reshape(-1), out.reshape(-1)
    for b in range(len(raw)):
        scale, numbers = half_at(raw[b], 0), all_numbers[32 * b : 32 * b + 32]
        nibbles_tile(flat[22 * b + 6 : 22 * b + 22], codes)
        bits = word_at(flat, 22 * b + 2)
        for i in range(len(numbers)):
            numbers[i] = scale * (F32(with_fifth(codes[i], bits, i)) - F32(16.0))


@kernel(_BLOCKS)
def q5_1(raw, out):
    """Scale and least number, the fifth bits, 16 bytes of codes."""
    codes, flat, all_numbers = new_u8(32), raw.reshape(-1), out.reshape(-1)
    for b in range(len(raw)):
        scale, least = half_at(raw[b], 0), half_at(raw[b], 2)
        nibbles_tile(flat[24 * b + 8 : 24 * b + 24], codes)
        bits, numbers = word_at(flat, 24 * b + 4), all_numbers[32 * b : 32 * b + 32]
        for i in range(len(numbers)):
            numbers[i] = scale * F32(with_fifth(codes[i], bits, i)) + least


@kernel(_BLOCKS)
def q2_k(raw, out):
    """Scales and least numbers of 4 bits, codes of 2 bits, two floats for those."""
    scales, leasts = new_f32(256), new_f32(256)
    codes, flat, all_numbers = new_u8(256), raw.reshape(-1), out.reshape(-1)
    for b in range(len(raw)):
        at, scale, least = 84 * b, half_at(raw[b], 80), half_at(raw[b], 82)
        for p in range(16):
            both = flat[at + p]
            fill_tile(scales[16 * p : 16 * p + 16], scale * F32(_U8(both & _LOWER)))
            fill_tile(leasts[16 * p : 16 * p + 16], least * F32(_U8(both >> _U8(4))))
        two_bits_tile(flat[at + 16 : at + 48], codes[:128])
        two_bits_tile(flat[at + 48 : at + 80], codes[128:])
        numbers = all_numbers[256 * b : 256 * b + 256]
        for i in range(len(numbers)):
            numbers[i] = scales[i] * F32(codes[i]) - leasts[i]


@kernel(_BLOCKS)
def q3_k(raw, out):
    """The third bits, codes of 2 bits, 16 scales of 6 bits, a float for those."""
    codes, scales = new_u8(256), new_f32(256)
    flat, all_numbers = raw.reshape(-1), out.reshape(-1)
    for b in range(len(raw)):
        at, scale = 110 * b, half_at(raw[b], 108)
        for p in range(16):
            lower = _U8(raw[b, 96 + p % 8] >> _U8(4 * (p // 8))) & _LOWER
            more = _U8(_U8(raw[b, 104 + p % 4] >> _U8(2 * (p // 4))) & _U8(3))
            signed = F32(np.int32(lower) + 16 * np.int32(more) - 32)
            fill_tile(scales[16 * p : 16 * p + 16], scale * signed)
        third = flat[at : at + 32]
        for k in range(8):
            first, bit, shift = at + 32 + 32 * (k // 4), _U8(k), _U8(2 * (k % 4))
            two, here = flat[first : first + 32], codes[32 * k : 32 * k + 32]
            for i in range(len(here)):
                upper = _U8(_U8(_U8(third[i] >> bit) & _U8(1)) << _U8(2))
                here[i] = _U8(_U8(two[i] >> shift) & _U8(3)) | upper
        numbers = all_numbers[256 * b : 256 * b + 256]
        for i in range(len(numbers)):
            numbers[i] = scales[i] * (F32(codes[i]) - F32(4.0))


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
            part_scale = scale * packed_scale(packed, p)
            part_least = least * packed_least(packed, p)
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
            part_scale = scale * packed_scale(packed, p)
            part_least = least * packed_least(packed, p)
            first, shift, bit = 48 + 32 * (p // 2), _U8(4 * (p % 2)), _U8(p)
            codes, numbers = raw[b, first : first + 32], out[b, 32 * p : 32 * p + 32]
            for i in range(32):
                code = _U8(_U8(codes[i] >> shift) & _LOWER)
                code |= _U8(_U8(_U8(fifth[i] >> bit) & _U8(1)) << _U8(4))
                numbers[i] = part_scale * F32(code) - part_least


@kernel(_BLOCKS)
def q6_k(raw, out):
    """The lower four bits of the codes, the upper two, 16 signed scales, a float for those."""
    codes, upper = new_u8(256), new_u8(128)
    scales, flat, all_numbers = new_f32(256), raw.reshape(-1), out.reshape(-1)
    for b in range(len(raw)):
        at, scale = 210 * b, half_at(raw[b], 208)
        for p in range(16):
            fill_tile(scales[16 * p : 16 * p + 16], scale * F32(np.int8(raw[b, 192 + p])))
        for half in range(2):
            here = codes[128 * half : 128 * half + 128]
            nibbles_tile(flat[at + 64 * half : at + 64 * half + 64], here)
            two_bits_tile(flat[at + 128 + 32 * half : at + 160 + 32 * half], upper)
            for i in range(len(here)):
                here[i] |= _U8(upper[i] << _U8(4))
        numbers = all_numbers[256 * b : 256 * b + 256]
        for i in range(len(numbers)):
            numbers[i] = scales[i] * (F32(codes[i]) - F32(32.0))
