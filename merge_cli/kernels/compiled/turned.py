"""Codes of matrices that are stored the other way round, to numbers: see `kernels.turned`.

What is stored is turned by tiles that stay in the L1 cache, as words or bytes: of numbers there are
four to eight times as many bytes. A tile's numbers then leave by rows.
"""

from __future__ import annotations

import numpy as np

from merge_cli.kernels.compiled.arrays import (
    as_bytes,
    new_f32,
    new_u8,
    new_u8_rows,
    new_u32_rows,
    window,
)
from merge_cli.kernels.compiled.codes import spread_tile
from merge_cli.kernels.compiled.instructions import float_of
from merge_cli.kernels.compiled.kernel import F32, U32, kernel
from merge_cli.kernels.compiled.parts import part

_LINES, _WORDS, _COLUMNS = 16, 128, 256  # 16 words are a line of the cache
_U8 = np.uint8


@part()
def turn_tile(stored, stride, first_line, first_column, lines, columns, turned):
    """turned[i, k] = the element of line first_line + k in column first_column + i."""
    for k in range(lines):
        at = (first_line + k) * stride + first_column
        line = window(stored, at, columns)
        for i in range(columns):
            turned[i, k] = line[i]


@part(inline=True)
def scaled_tile(codes, shift, mask, column, row, width, zeros, scales, group, begin, out):
    """(code - zero) * scale of columns from `column` on of a row, as far as `out` reaches.

    A code is what `mask` leaves of an element of `codes` that is moved by `shift`.
    """
    base = row * width - begin
    at = max(column, -base)
    end = min(column + len(codes), len(out) - base)
    while at < end:
        number = at // group
        stop = min(end, (number + 1) * group)
        here, target = window(codes, at - column, stop - at), window(out, base + at, stop - at)
        zero, scale = zeros[row, number], scales[row, number]
        for i in range(len(target)):
            code = np.int32(U32(U32(here[i]) >> (shift & U32(31))) & mask)
            target[i] = (F32(code) - zero) * scale
        at = stop


@kernel("void(u4[::1], i8, i8, i8, f4[:, ::1], f4[:, ::1], i8, i8, f4[::1])")
def turned_words(stored, stride, height, bits, zeros, scales, group, begin, out):
    """Codes of 2, 4 or 8 bits one below the other in words, a column for each row of `out`.

    Args:
        stored: `height` lines of words, `stride` words from the beginning of one to the next.
    """
    per_word = 32 // bits
    width, rows = height * per_word, len(scales)
    turned = new_u32_rows(_LINES, _WORDS)
    codes = new_u8(_WORDS * 16)
    for first in range(0, rows, _LINES):
        columns = min(_LINES, rows - first)
        for line in range(0, height, _WORDS):
            lines = min(_WORDS, height - line)
            turn_tile(stored, stride, line, first, lines, columns, turned)
            for i in range(columns):
                raw = as_bytes(window(turned, i * _WORDS, lines))
                here = raw if bits == 8 else window(codes, 0, lines * per_word)
                if bits != 8:
                    spread_tile(raw, bits, here)
                column = line * per_word
                scaled_tile(
                    here,
                    U32(0),
                    U32(255),
                    column,
                    first + i,
                    width,
                    zeros,
                    scales,
                    group,
                    begin,
                    out,
                )


@kernel("void(u4[::1], i8, i8, u4[::1], f4[:, ::1], f4[:, ::1], i8, i8, i8, f4[::1])")
def turned_eights(stored, stride, width, shifts, zeros, scales, group, skip, begin, out):
    """Codes of 4 bits, eight rows of `out` in each word; the first `skip` of those are left out.

    Args:
        stored: `width` lines of words, `stride` words from the beginning of one to the next.
    """
    rows = len(scales)
    turned = new_u32_rows(_LINES, _WORDS)
    eights = (skip + rows + 7) // 8
    for first in range(0, eights, _LINES):
        columns = min(_LINES, eights - first)
        for line in range(0, width, _WORDS):
            lines = min(_WORDS, width - line)
            turn_tile(stored, stride, line, first, lines, columns, turned)
            for i in range(columns):
                for k in range(8):
                    row = 8 * (first + i) + k - skip
                    if row < 0 or row >= rows:
                        continue
                    here = window(turned, i * _WORDS, lines)
                    scaled_tile(
                        here, shifts[k], U32(15), line, row, width, zeros, scales, group, begin, out
                    )


@part()
def e2m1(code):
    """An E2M1 number as float32: from 1 on its bits are float32's, moved; below are 0 and 0.5."""
    magnitude = U32(code & U32(7))
    bits = U32(U32(magnitude << U32(22)) + U32(0x3F000000))
    bits = U32(0x3F000000) if magnitude == U32(1) else bits
    bits = U32(0) if magnitude == U32(0) else bits
    return float_of(U32(bits | U32(U32(code & U32(8)) << U32(28))))


@part()
def e2m1_tile(raw, is_upper, powers, out):
    """E2M1 numbers of the lower or of the upper four bits of bytes, times powers."""
    if is_upper:
        for i in range(len(out)):
            out[i] = e2m1(U32(raw[i] >> _U8(4))) * powers[i]
    else:
        for i in range(len(out)):
            out[i] = e2m1(U32(raw[i] & _U8(15))) * powers[i]


@part()
def powers_tile(exponents, column, number, powers):
    """The powers of two of one group of several columns."""
    for i in range(len(powers)):
        exponent = U32(exponents[column + i, number])
        bits = U32(exponent << U32(23))
        bits = U32(0x00400000) if exponent == U32(0) else bits  # 2^-127 is subnormal
        powers[i] = float_of(U32(0x7FC00000) if exponent == U32(255) else bits)


@kernel("void(u1[::1], i8, i8, i8, u1[:, :], i8, i8, i8, i8, f4[::1])")
def turned_fp4(stored, stride, width, height, exponents, group, first, count, begin, out):
    """Two numbers one below the other in each byte; columns are those of `out`, too.

    Args:
        stored: `width` lines of `height` bytes, `stride` from the beginning of one to the next.
        exponents: of the groups of rows that rows [first, first + count) lie in.
    """
    turned = new_u8_rows(_LINES, _COLUMNS)
    powers = new_f32(_COLUMNS)
    for column in range(0, width, _COLUMNS):
        columns = min(_COLUMNS, width - column)
        number = -1
        for byte in range(0, height, _LINES):
            lines = min(_LINES, height - byte)
            turn_tile(stored, stride, column, byte, columns, lines, turned)
            for k in range(2 * lines):
                row = 2 * byte + k - first % 2
                if row < 0 or row >= count:
                    continue
                base = row * width - begin
                low, high = max(column, -base), min(column + columns, len(out) - base)
                if low >= high:
                    continue
                if number != (first + row) // group - first // group:
                    number = (first + row) // group - first // group
                    powers_tile(exponents, column, number, window(powers, 0, columns))
                size = high - low
                raw = window(turned, k // 2 * _COLUMNS + low - column, size)
                factors = window(powers, low - column, size)
                e2m1_tile(raw, k % 2 == 1, factors, window(out, base + low, size))
