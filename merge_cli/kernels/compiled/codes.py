"""Codes of a few bits to numbers: see `kernels.codes`."""

from __future__ import annotations

import numpy as np

from merge_cli.kernels.compiled.kernel import F32, U32, kernel

_U16, _U64 = np.uint16, np.uint64


@kernel(["void(f4[::1], u1[::1], f4[::1])", "void(u8[::1], u1[::1], u8[::1])"])
def look_up(table, codes, out):
    """out = table[codes]."""
    for i in range(len(codes)):
        out[i] = table[codes[i]]


@kernel("void(u1[::1], i8, u1[::1])")
def spread_bytes(raw, bits, out):
    """The codes of each byte one after another, the lowest bits first.

    Copies of the byte, moved so that each has another code in its place, become one integer.
    """
    if bits == 4:
        pairs = out.view(np.uint16)
        for i in range(len(raw)):
            x = U32(raw[i])
            pairs[i] = _U16((x | (x << U32(4))) & U32(0x0F0F))
    elif bits == 2:
        fours = out.view(np.uint32)
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


@kernel("void(u1[::1], i8, i8, u1[::1])")
def spread_runs(raw, bits, run, out):
    """Of each `run` bytes the lowest bits first, then the next ones."""
    per_byte, mask = 8 // bits, np.uint8((1 << bits) - 1)
    for begin in range(0, len(raw), run):
        part = raw[begin : begin + run]
        for k in range(per_byte):
            shift = np.uint8(k * bits)
            codes = out[begin * per_byte + k * run :][:run]
            for i in range(len(part)):
                codes[i] = (part[i] >> shift) & mask


@kernel("void(f4[:, ::1], f4[:, ::1])")
def scale_groups(numbers, scales):
    """Multiply each group of columns with its scale; one row of scales is for all rows."""
    groups = scales.shape[1]
    width = numbers.shape[1] // groups
    for r in range(len(numbers)):
        row, of_row = numbers[r], scales[r if len(scales) > 1 else 0]
        for g in range(groups):
            group, scale = row[g * width :][:width], of_row[g]
            for i in range(len(group)):
                group[i] *= scale


@kernel("void(u1[:, ::1], f4, f4[:, ::1], f4[:, ::1], boolean, f4[:, ::1])")
def scaled_parts(codes, offset, scales, leasts, has_leasts, out):
    """out = scale * (code - offset), less the least number of the part if there are such."""
    parts = scales.shape[1]
    width = codes.shape[1] // parts
    for r in range(len(codes)):
        for p in range(parts):
            stored, numbers = codes[r, p * width :][:width], out[r, p * width :][:width]
            scale = scales[r, p]
            if has_leasts:
                least = leasts[r, p]
                for i in range(len(stored)):
                    numbers[i] = scale * (F32(stored[i]) - offset) - least
            else:
                for i in range(len(stored)):
                    numbers[i] = scale * (F32(stored[i]) - offset)
