"""GGUF's blocks of codes to numbers: the twins of the decoders in formats/gguf/blocks.py.

Their docstrings say where a block has its fields. Here a block goes from its bytes to float32 with
nothing between but a copy of 16 or 32 of its bytes. Loops over those are unrolled to vectors.
"""

from __future__ import annotations

import numpy as np

from merge_cli.kernels.compiled.arrays import copy_16, copy_32, window
from merge_cli.kernels.compiled.instructions import bits_of, float_of
from merge_cli.kernels.compiled.kernel import F32, INFINITY, U32, kernel
from merge_cli.kernels.compiled.parts import part

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


@kernel(_BLOCKS, side_by_side=True)
def q8_0(raw, out):
    """Scale, 32 signed bytes."""
    for b in range(len(raw)):
        block, numbers = window(raw, 34 * b, 34), window(out, 32 * b, 32)
        scale, codes = half_at(block, 0), copy_32(block, 2)
        for i in range(32):
            numbers[i] = scale * F32(np.int8(codes[i]))


@kernel(_BLOCKS, side_by_side=True)
def q4_0(raw, out):
    """Scale, 16 bytes of codes."""
    for b in range(len(raw)):
        block, numbers = window(raw, 18 * b, 18), window(out, 32 * b, 32)
        scale, codes = half_at(block, 0), copy_16(block, 2)
        for i in range(16):
            numbers[i] = scale * (F32(_U8(codes[i] & _LOWER)) - F32(8.0))
        for i in range(16):
            numbers[16 + i] = scale * (F32(_U8(codes[i] >> _U8(4))) - F32(8.0))


@kernel(_BLOCKS, side_by_side=True)
def q4_1(raw, out):
    """Scale and least number, 16 bytes of codes."""
    for b in range(len(raw)):
        block, numbers = window(raw, 20 * b, 20), window(out, 32 * b, 32)
        scale, least, codes = half_at(block, 0), half_at(block, 2), copy_16(block, 4)
        for i in range(16):
            numbers[i] = scale * F32(_U8(codes[i] & _LOWER)) + least
        for i in range(16):
            numbers[16 + i] = scale * F32(_U8(codes[i] >> _U8(4))) + least


@kernel(_BLOCKS, side_by_side=True)
def q5_0(raw, out):
    """Scale, the fifth bits, 16 bytes of codes."""
    for b in range(len(raw)):
        block, numbers = window(raw, 22 * b, 22), window(out, 32 * b, 32)
        scale, bits, codes = half_at(block, 0), word_at(block, 2), copy_16(block, 6)
        for i in range(16):
            code = with_fifth(_U8(codes[i] & _LOWER), bits, i)
            numbers[i] = scale * (F32(code) - F32(16.0))
        for i in range(16):
            code = with_fifth(_U8(codes[i] >> _U8(4)), bits, 16 + i)
            numbers[16 + i] = scale * (F32(code) - F32(16.0))


@kernel(_BLOCKS, side_by_side=True)
def q5_1(raw, out):
    """Scale and least number, the fifth bits, 16 bytes of codes."""
    for b in range(len(raw)):
        block, numbers = window(raw, 24 * b, 24), window(out, 32 * b, 32)
        scale, least, bits = half_at(block, 0), half_at(block, 2), word_at(block, 4)
        codes = copy_16(block, 8)
        for i in range(16):
            code = with_fifth(_U8(codes[i] & _LOWER), bits, i)
            numbers[i] = scale * F32(code) + least
        for i in range(16):
            code = with_fifth(_U8(codes[i] >> _U8(4)), bits, 16 + i)
            numbers[16 + i] = scale * F32(code) + least


@kernel(_BLOCKS, side_by_side=True)
def q2_k(raw, out):
    """Scales and least numbers of 4 bits, codes of 2 bits, two floats for those."""
    for b in range(len(raw)):
        block = window(raw, 84 * b, 84)
        scale, least = half_at(block, 80), half_at(block, 82)
        for p in range(16):
            both, codes = block[p], copy_16(block, 16 + 32 * (p // 8) + 16 * (p % 2))
            part_scale = scale * F32(_U8(both & _LOWER))
            part_least = least * F32(_U8(both >> _U8(4)))
            shift, numbers = _U8(2 * (p // 2 % 4)), window(out, 256 * b + 16 * p, 16)
            for i in range(16):
                code = _U8(_U8(codes[i] >> shift) & _U8(3))
                numbers[i] = part_scale * F32(code) - part_least


@kernel(_BLOCKS, side_by_side=True)
def q3_k(raw, out):
    """The third bits, codes of 2 bits, 16 scales of 6 bits, a float for those."""
    for b in range(len(raw)):
        block = window(raw, 110 * b, 110)
        scale = half_at(block, 108)
        for p in range(16):
            lower = _U8(block[96 + p % 8] >> _U8(4 * (p // 8))) & _LOWER
            more = _U8(_U8(block[104 + p % 4] >> _U8(2 * (p // 4))) & _U8(3))
            part_scale = scale * F32(np.int32(lower) + 16 * np.int32(more) - 32)
            codes = copy_16(block, 32 + 32 * (p // 8) + 16 * (p % 2))
            third, bit = copy_16(block, 16 * (p % 2)), _U8(p // 2)
            shift, numbers = _U8(2 * (p // 2 % 4)), window(out, 256 * b + 16 * p, 16)
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


@kernel(_BLOCKS, side_by_side=True)
def q4_k(raw, out):
    """Two floats for 8 scales and 8 least numbers, those in 12 bytes, codes of 4 bits."""
    for b in range(len(raw)):
        block = window(raw, 144 * b, 144)
        scale, least, packed = half_at(block, 0), half_at(block, 2), window(block, 4, 12)
        for p in range(8):
            part_scale = scale * packed_scale(packed, p)
            part_least = least * packed_least(packed, p)
            codes, shift = copy_32(block, 16 + 32 * (p // 2)), _U8(4 * (p % 2))
            numbers = window(out, 256 * b + 32 * p, 32)
            for i in range(32):
                code = _U8(_U8(codes[i] >> shift) & _LOWER)
                numbers[i] = part_scale * F32(code) - part_least


@kernel(_BLOCKS, side_by_side=True)
def q5_k(raw, out):
    """As `q4_k`, with the fifth bits between scales and codes."""
    for b in range(len(raw)):
        block = window(raw, 176 * b, 176)
        scale, least, packed = half_at(block, 0), half_at(block, 2), window(block, 4, 12)
        fifth = copy_32(block, 16)
        for p in range(8):
            part_scale = scale * packed_scale(packed, p)
            part_least = least * packed_least(packed, p)
            codes, shift, bit = copy_32(block, 48 + 32 * (p // 2)), _U8(4 * (p % 2)), _U8(p)
            numbers = window(out, 256 * b + 32 * p, 32)
            for i in range(32):
                code = _U8(_U8(codes[i] >> shift) & _LOWER)
                code |= _U8(_U8(_U8(fifth[i] >> bit) & _U8(1)) << _U8(4))
                numbers[i] = part_scale * F32(code) - part_least


@kernel(_BLOCKS, side_by_side=True)
def q6_k(raw, out):
    """The lower four bits of the codes, the upper two, 16 signed scales, a float for those."""
    for b in range(len(raw)):
        block = window(raw, 210 * b, 210)
        scale = half_at(block, 208)
        for p in range(16):
            part_scale = scale * F32(np.int8(block[192 + p]))
            lower, shift = copy_16(block, 64 * (p // 8) + 16 * (p % 4)), _U8(4 * (p % 8 // 4))
            upper, two = copy_16(block, 128 + 32 * (p // 8) + 16 * (p % 2)), _U8(2 * (p % 8 // 2))
            numbers = window(out, 256 * b + 16 * p, 16)
            for i in range(16):
                code = _U8(_U8(lower[i] >> shift) & _LOWER)
                code |= _U8(_U8(_U8(upper[i] >> two) & _U8(3)) << _U8(4))
                numbers[i] = part_scale * (F32(code) - F32(32.0))
