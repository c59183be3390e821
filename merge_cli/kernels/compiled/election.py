"""Sign election: see `kernels.elect`."""

from __future__ import annotations

from merge_cli.kernels.compiled.arrays import new_f32
from merge_cli.kernels.compiled.kernel import kernel
from merge_cli.kernels.compiled.tiles import TILE, elect_tile


@kernel("void(f4[:, ::1], f4[::1], boolean, i8, f4, f4, f4[::1])")
def disjoint_mean(rows, weights, weighted, divide_by, zero_sign, least_divisor, out):
    """See `kernels.elect.disjoint_mean`, whose operations these are, one by one.

    `least_divisor` is 0 where there is none.
    """
    size = rows.shape[1]
    elected, divisor = new_f32(TILE), new_f32(TILE)
    for begin in range(0, size, TILE):
        total = out[begin : begin + TILE]
        elect_tile(
            rows,
            begin,
            weights,
            weighted,
            divide_by,
            zero_sign,
            least_divisor,
            elected,
            divisor,
            total,
        )
