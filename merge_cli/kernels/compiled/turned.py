"""Codes of matrices that are stored the other way round, to numbers: see `kernels.turned`.

What is stored is turned by tiles that stay in the L1 cache, as words or bytes: of numbers there are
four to eight times as many bytes. A tile's numbers then leave by rows.
"""

from __future__ import annotations

import numpy as np

from merge_cli.kernels.compiled.codes import spread_tile
from merge_cli.kernels.compiled.kernel import F32, U32, float_of, kernel, part

_LINES, _WORDS, _COLUMNS = 16, 128, 64  # 16 words are a line of the cache
_U8 = np.uint8


@part()
def turn_tile(words, first_line, first_column, turned):
    """turned[i, k] = words[first_line + k, first_column + i], as far as there are any."""
    lines = min(turned.shape[1], words.shape[0] - first_line)
    columns = min(turned.shape[0], words.shape[1] - first_column)
    for k in range(lines):
        line = words[first_line + k]
        for i in range(columns):
            turned[i, k] = line[first_column + i]
    return lines, columns


@part()
def scaled_tile(codes, column, row, width, zeros, scales, group, begin, out):
    """(code - zero) * scale of columns from `column` on of a row, as far as `out` reaches."""
    base = row * width - begin
    at = max(column, -base)
    end = min(column + len(codes), len(out) - base)
    while at < end:
        number = at // group
        stop = min(end, (number + 1) * group)
        part_codes, target = codes[at - column : stop - column], out[base + at : base + stop]
        zero, scale = zeros[row, number], scales[row, number]
        for i in range(len(target)):
            target[i] = (F32(part_codes[i]) - zero) * scale
        at = stop


@kernel("void(u4[:, :], i8, f4[:, ::1], f4[:, ::1], i8, i8, f4[::1])")
def turned_words(words, bits, zeros, scales, group, begin, out):
    """Codes of 2, 4 or 8 bits one below the other in words, a column for each row of `out`."""
    per_word = 32 // bits
    width = len(words) * per_word
    turned = np.empty((_LINES, _WORDS), np.uint32)
    codes = np.empty(_WORDS * 16, np.uint8)
    for first in range(0, words.shape[1], _LINES):
        for line in range(0, len(words), _WORDS):
            lines, rows = turn_tile(words, line, first, turned)
            for i in range(rows):
                raw = turned[i, :lines].view(np.uint8)
                here = raw if bits == 8 else codes[: lines * per_word]
                if bits != 8:
                    spread_tile(raw, bits, here)
                column = line * per_word
                scaled_tile(here, column, first + i, width, zeros, scales, group, begin, out)


@kernel("void(u4[:, :], u4[::1], f4[:, ::1], f4[:, ::1], i8, i8, i8, f4[::1])")
def turned_eights(words, shifts, zeros, scales, group, skip, begin, out):
    """Codes of 4 bits, eight rows of `out` in each word; the first `skip` of those are left out."""
    width = len(words)
    turned = np.empty((_LINES, _WORDS), np.uint32)
    codes = np.empty(_WORDS, np.uint8)
    for first in range(0, words.shape[1], _LINES):
        for line in range(0, width, _WORDS):
            lines, columns = turn_tile(words, line, first, turned)
            for i in range(columns):
                for k in range(8):
                    row = 8 * (first + i) + k - skip
                    if row < 0 or row >= len(scales):
                        continue
                    shift, word = shifts[k], turned[i, :lines]
                    for j in range(lines):
                        codes[j] = _U8(U32(word[j] >> shift) & U32(15))
                    scaled_tile(codes[:lines], line, row, width, zeros, scales, group, begin, out)


@part()
def e2m1_tile(codes, shift, powers, out):
    """E2M1 numbers in four bits of bytes, times powers."""
    for i in range(len(out)):
        code = U32(U32(codes[i]) >> shift)
        magnitude = U32(code & U32(7))
        # From 1 on the bits are float32's, moved; the numbers below are 0 and 0.5.
        bits = U32(U32(magnitude << U32(22)) + U32(0x3F000000))
        bits = U32(0x3F000000) if magnitude == U32(1) else bits
        bits = U32(0) if magnitude == U32(0) else bits
        sign = U32(U32(code & U32(8)) << U32(28))
        out[i] = float_of(U32(bits | sign)) * powers[i]


@kernel("void(u1[:, :], f4[:, ::1], i8, i8, i8, i8, f4[::1])")
def turned_fp4(raw, powers, group, first, count, begin, out):
    """Two numbers one below the other in each byte; columns are those of `out`, too.

    Args:
        powers: of the groups of rows that rows [first, first + count) lie in.
    """
    width = len(raw)
    turned = np.empty((_LINES, _COLUMNS), np.uint8)
    for column in range(0, width, _COLUMNS):
        columns = min(_COLUMNS, width - column)
        for byte in range(0, raw.shape[1], _LINES):
            lines = min(_LINES, raw.shape[1] - byte)
            for i in range(columns):
                line = raw[column + i]
                for k in range(lines):
                    turned[k, i] = line[byte + k]
            for k in range(2 * lines):
                row = 2 * byte + k - first % 2
                if row < 0 or row >= count:
                    continue
                base = row * width - begin
                low, high = max(column, -base), min(column + columns, len(out) - base)
                if low >= high:
                    continue
                of_row = powers[(first + row) // group - first // group]
                codes = turned[k // 2, low - column : high - column]
                shift = U32(4) if k % 2 else U32(0)
                e2m1_tile(codes, shift, of_row[low:high], out[base + low : base + high])
