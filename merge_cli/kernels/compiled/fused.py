"""Merges from stored bytes to stored bytes, tile by tile: see `kernels.fused`.

Inputs lie in one array of bytes: input s begins at byte starts[s], its elements are encoded as
kinds[s] says (`tiles.BF16` and so on), and the first one is the base where there is one. What is
returned says what was seen: `NOT_FINITE`, NaN or Inf among the inputs; `TOO_LARGE`, a result that
float16 cannot hold. In either case `out` is not to be used before the plain way has looked.
"""

from __future__ import annotations

from merge_cli.kernels.compiled.arrays import new_f32, new_f32_rows
from merge_cli.kernels.compiled.kernel import F32, U32, kernel
from merge_cli.kernels.compiled.tiles import (
    BF16,
    TILE,
    add_base_tile,
    add_bf16_tile,
    add_weighted_tile,
    divide_tile,
    drop_tile,
    elect_tile,
    encode_tile,
    load_tile,
    scale_tile,
    tile_of,
    trim_tile,
)

NOT_FINITE, TOO_LARGE = 1, 2


@kernel(
    "i8(u1[::1], i8[::1], i8[::1], i8, boolean, f4[::1], f4, f4, u4[:, ::1], f4[::1], u4, "
    "u1[::1], i8)"
)
def merge_linear(
    stored, starts, kinds, size, based, weights, divisor, scale, masks, factors, low, out, out_kind
):
    """sum of w_i * x_i / divisor; with a base x_i is a task vector, and it is base + scale * that.

    Args:
        divisor: 1 divides nothing.
        masks: k0, k1, limit and whether all is kept, for each source; no rows for no masks.
        low: index of the first element mod 2^32, for the masks.
    """
    seen = 0
    # Where only a sum is in the cache, there is room for more of it.
    tile = TILE if based or len(masks) else 4 * TILE
    base, row = new_f32(tile), new_f32(tile)
    total = new_f32(tile)
    first = 1 if based else 0
    for begin in range(0, size, tile):
        length = min(tile, size - begin)
        minus, values, mixed = base[:length], row[:length], total[:length]
        for i in range(len(starts)):
            s = i - first
            raw = tile_of(stored, starts[i], kinds[i], begin, length)
            if kinds[i] == BF16 and not (based or len(masks) or factors[s] != F32(1.0)):
                if not add_bf16_tile(raw, weights[s], s == 0, mixed):
                    seen |= NOT_FINITE
                continue
            into = minus if s < 0 else values
            if not load_tile(raw, kinds[i], based and s >= 0, minus, into):
                seen |= NOT_FINITE
            if s < 0:
                continue
            if len(masks) and not masks[s, 3]:
                at = U32(low + U32(begin))
                drop_tile(values, masks[s, 0], masks[s, 1], masks[s, 2], at, factors[s])
            elif factors[s] != F32(1.0):
                scale_tile(values, factors[s])
            add_weighted_tile(values, weights[s], s == 0, mixed)
        if divisor != F32(1.0):
            divide_tile(mixed, divisor)
        if based:
            add_base_tile(minus, scale, mixed)
        if not encode_tile(mixed, out_kind, tile_of(out, 0, out_kind, begin, length), row):
            seen |= TOO_LARGE
    return seen


@kernel(
    "i8(u1[::1], i8[::1], i8[::1], i8, f4[::1], boolean, i8, f4, f4, u4[:, ::1], i8[::1], "
    "f4[::1], u4, u1[::1], i8)"
)
def merge_disjoint(
    stored,
    starts,
    kinds,
    size,
    weights,
    weighted,
    divide_by,
    zero_sign,
    scale,
    rules,
    ties,
    factors,
    low,
    out,
    out_kind,
):
    """Task vectors that are dropped or trimmed, then elected and averaged; base + scale * that.

    Args:
        rules: what is kept of each source: k0, k1, limit and whether all is kept, of a mask; or
            of a cut, if `ties` has a number for each source, a threshold's key in the first column.
        ties: of the elements, how many from the first on may be kept as ties; empty for masks.
    """
    seen = 0
    sources = len(weights)
    base, total = new_f32(TILE), new_f32(TILE)
    rows = new_f32_rows(sources, TILE)
    elected, divisor = new_f32(TILE), new_f32(TILE)
    for begin in range(0, size, TILE):
        length = min(TILE, size - begin)
        minus, mixed = base[:length], total[:length]
        for i in range(sources + 1):
            s = i - 1
            values = minus if i == 0 else rows[s, :length]
            raw = tile_of(stored, starts[i], kinds[i], begin, length)
            if not load_tile(raw, kinds[i], i > 0, minus, values):
                seen |= NOT_FINITE
            if i == 0:
                continue
            if rules[s, 3]:
                if factors[s] != F32(1.0):
                    scale_tile(values, factors[s])
            elif len(ties):
                here = min(max(ties[s] - begin, 0), length)
                trim_tile(values, rules[s, 0], here, factors[s])
            else:
                at = U32(low + U32(begin))
                drop_tile(values, rules[s, 0], rules[s, 1], rules[s, 2], at, factors[s])
        elect_tile(
            rows, 0, weights, weighted, divide_by, zero_sign, F32(0.0), elected, divisor, mixed
        )
        add_base_tile(minus, scale, mixed)
        if not encode_tile(mixed, out_kind, tile_of(out, 0, out_kind, begin, length), elected):
            seen |= TOO_LARGE
    return seen
