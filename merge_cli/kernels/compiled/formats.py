"""Storage formats: float32 from what is stored, and back."""

from __future__ import annotations

from merge_cli.kernels.compiled.arrays import as_bytes, new_f32
from merge_cli.kernels.compiled.kernel import INFINITY, kernel
from merge_cli.kernels.compiled.tile_measures import largest_key_tile
from merge_cli.kernels.compiled.tiles import BF16, F16, TILE, decode_tile, encode_tile, load_tile


@kernel("boolean(u2[:, ::1], f4[:, ::1], f4[::1], boolean, boolean)")
def decode_bf16(raw, rows, base, has_base, deltas):
    """bfloat16 bits to float32; whether any is NaN or Inf.

    The first row of `raw` goes to `base` if there is one; the others to `rows`, less the base if
    `deltas`.
    """
    finite = True
    size = raw.shape[1]
    for begin in range(0, size, TILE):
        minus = base[begin : begin + TILE]
        for s in range(len(raw)):
            stored = as_bytes(raw[s, begin : begin + TILE])
            is_base = has_base and s == 0
            result = minus if is_base else rows[s - has_base, begin : begin + TILE]
            finite &= load_tile(stored, BF16, deltas and not is_base, minus, result)
    return not finite


@kernel("boolean(u2[::1], f4[::1])")
def decode_f16(raw, out):
    """float16 bits to float32; whether any is NaN or Inf."""
    finite = True
    for begin in range(0, len(raw), TILE):
        stored = as_bytes(raw[begin : begin + TILE])
        finite &= decode_tile(stored, F16, out[begin : begin + TILE])
    return not finite


@kernel("boolean(f4[::1])")
def non_finite(values):
    """Whether any is NaN or Inf."""
    return largest_key_tile(values) >= INFINITY


@kernel("void(f4[::1], u2[::1])")
def encode_bf16(values, raw):
    """float32 to bfloat16 bits, to nearest, ties to even; every NaN becomes 0x7FC0."""
    encode_tile(values, BF16, as_bytes(raw), values)


@kernel("boolean(f4[::1], u2[::1])")
def encode_f16(values, raw):
    """float32 to float16 bits, to nearest, ties to even; NaN becomes 0x7E00; whether any is Inf."""
    shifted = new_f32(TILE)
    fits = True
    for begin in range(0, len(values), TILE):
        stored = as_bytes(raw[begin : begin + TILE])
        fits &= encode_tile(values[begin : begin + TILE], F16, stored, shifted)
    return not fits
