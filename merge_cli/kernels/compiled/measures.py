"""Sums for the report. They alone may be re-associated: they are rounded to six digits."""

from __future__ import annotations

from merge_cli.kernels.compiled.arrays import new_i32, new_i32_rows
from merge_cli.kernels.compiled.kernel import CHUNK, F32, kernel
from merge_cli.kernels.compiled.tile_measures import relate_tile
from merge_cli.kernels.compiled.tiles import TILE

_SUMS = {"reassoc", "nsz"}


@kernel("void(f4[:, ::1], f8[:, ::1])", fastmath=_SUMS)
def gram(rows, out):
    """out += the dot products between rows, to about six digits."""
    sources, size = rows.shape
    for begin in range(0, size, CHUNK):
        for s in range(sources):
            a = rows[s, begin : begin + CHUNK]
            for t in range(s, sources):
                b = rows[t, begin : begin + CHUNK]
                part = F32(0.0)
                for i in range(len(a)):
                    part += a[i] * b[i]
                out[s, t] += part
                if s != t:
                    out[t, s] += part


@kernel("UniTuple(f8, 2)(f4[::1], f4[::1])", fastmath=_SUMS)
def quick_change(base, merged):
    """sum of base^2 and of (merged - base)^2, to about six digits."""
    squares, changes = 0.0, 0.0
    for begin in range(0, len(base), CHUNK):
        x, y = base[begin : begin + CHUNK], merged[begin : begin + CHUNK]
        square, change = F32(0.0), F32(0.0)
        for i in range(len(x)):
            square += x[i] * x[i]
            change += (y[i] - x[i]) * (y[i] - x[i])
        squares += square
        changes += change
    return squares, changes


@kernel("i8(f4[:, ::1], i8[:, ::1], i8[:, ::1])")
def count_signs(rows, both, agree):
    """Add up, for each pair of rows, where both are non-zero, and where they agree in sign.

    Returns:
        elements on which some row is positive and another negative.
    """
    sources, size = rows.shape
    signs = new_i32_rows(sources, TILE)
    least, most = new_i32(TILE), new_i32(TILE)
    conflict = 0
    for begin in range(0, size, TILE):
        length = min(TILE, size - begin)
        conflict += relate_tile(rows, begin, length, signs, least, most, both, agree)
    return conflict
