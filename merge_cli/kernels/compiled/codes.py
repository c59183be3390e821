"""Codes of a few bits to numbers: see `kernels.codes`."""

from __future__ import annotations

import numpy as np

from merge_cli.kernels.compiled.arrays import as_halves, as_words, copy_16, window
from merge_cli.kernels.compiled.kernel import U32, kernel
from merge_cli.kernels.compiled.parts import part

_U16, _U64 = np.uint16, np.uint64


@kernel(["void(f4[::1], u1[::1], f4[::1])", "void(u8[::1], u1[::1], u8[::1])"])
def look_up(table, codes, out):
    """out = table[codes]."""
    for i in range(len(codes)):
        out[i] = table[codes[i]]


@part()
def spread_tile(raw, bits, out):
    """The codes of each byte one after another, the lowest bits first.

    Copies of the byte, moved so that each has another code in its place, become one integer.
    """
    if bits == 4:
        pairs = as_halves(out)
        for i in range(len(raw)):
            x = U32(raw[i])
            pairs[i] = _U16((x | (x << U32(4))) & U32(0x0F0F))
    elif bits == 2:
        fours = as_words(out)
        for i in range(len(raw)):
            x = U32(raw[i])
            x |= x << U32(12)
            fours[i] = (x | (x << U32(6))) & U32(0x03030303)
    else:
        eights = out.view(np.uint64)
        for i in range(len(raw)):
            x = _U64(raw[i])
            x |= x << _U64(28)
            x |= x << _U64(14)
            eights[i] = (x | (x << _U64(7))) & _U64(0x0101010101010101)


@kernel("void(u1[::1], i8, u1[::1])")
def spread_bytes(raw, bits, out):
    """The codes of each byte one after another, the lowest bits first."""
    spread_tile(raw, bits, out)


@kernel("void(f4[:, ::1], f4[:, ::1])", side_by_side=True)
def scale_groups(numbers, scales):
    """Multiply each group of columns with its scale; one row of scales is for all rows."""
    groups = scales.shape[1]
    width = numbers.shape[1] // groups
    for r in range(len(numbers)):
        of_row = window(scales, (r if len(scales) > 1 else 0) * groups, groups)
        for g in range(groups):
            group, scale = window(numbers, (r * groups + g) * width, width), of_row[g]
            whole = width // 16 * 16  # the smallest groups have as many
            for first in range(0, whole, 16):
                before, after = copy_16(group, first), window(group, first, 16)
                for i in range(16):
                    after[i] = before[i] * scale
            for i in range(whole, width):
                group[i] *= scale
