"""float32 to codes of eight and four bits, by groups that share a scale.

What a scale is follows from the largest value of its group, by the rule of the format (formats/).
Here are the two loops around that rule: over a group for its largest value, and over it again for
its codes. A code is the number of the small format that is nearest to value / scale, ties to even.
Quotients are float32, so a value within half a unit of float32 of a tie may go either way.

E4M3 has a NaN, and what is not finite becomes it; E5M2 has Inf, too. Formats of four bits have
neither: there a group with NaN or Inf in it has a scale that is NaN.
"""

from __future__ import annotations

from typing import Any

from merge_cli.kernels.backend import host_primitive

LARGEST_E4M3 = 448.0
LARGEST_E5M2 = 57344.0
LARGEST_E2M1 = 6.0
_NAN = 0x7F
_INFINITY_E5M2 = 0x7C


def e4m3_codes(quotient: Any) -> Any:
    """The nearest E4M3 numbers of numbers from 0 on: numpy float32 -> uint8, of the same shape."""
    return _small_floats(quotient, 3, 7, LARGEST_E4M3)


def _small_floats(quotient: Any, fraction: int, bias: int, largest: float) -> Any:
    """The nearest numbers of a format with so many fraction bits: as of `e4m3_codes`.

    Args:
        bias: of the exponent.
        largest: number of the format; what is beyond becomes it.
    """
    import numpy as np

    clipped = np.minimum(quotient, np.float32(largest))
    bits, shift = clipped.view(np.uint32), 23 - fraction
    half = np.uint32((1 << (shift - 1)) - 1)
    normal = (bits + half + ((bits >> shift) & 1) >> shift) - ((127 - bias) << fraction)
    # A float32's last place at this number is the format's smallest: adding it rounds to that.
    moved = np.float32(2.0 ** (24 - bias - fraction))
    small = (clipped + moved).view(np.uint32) - moved.view(np.uint32)
    return np.where(clipped < 2.0 ** (1 - bias), small, normal).astype(np.uint8)


@host_primitive
def block_largest(rows: Any, tall: int, wide: int, largest: Any) -> None:
    """The largest finite magnitude of each block.

    Args:
        rows: numpy float32 [rows, columns].
        tall, wide: rows and columns of a block; the last ones may have fewer.
        largest: numpy float32 [blocks down, blocks across], filled.
    """
    import numpy as np

    finite = np.where(np.isfinite(rows), np.abs(rows), np.float32(0))
    for down, across in np.ndindex(*largest.shape):
        block = finite[down * tall : (down + 1) * tall, across * wide : (across + 1) * wide]
        largest[down, across] = block.max(initial=0)


@block_largest.compiled
def _block_largest_compiled(rows: Any, tall: int, wide: int, largest: Any) -> None:
    from merge_cli.kernels import compiled

    compiled.block_largest(rows, tall, wide, largest)


def largest_magnitude(values: Any) -> float:
    """The largest finite magnitude of all: numpy float32, flat."""
    import numpy as np

    largest = np.zeros((1, 1), np.float32)
    block_largest(values[None], 1, len(values), largest)
    return float(largest[0, 0])


@host_primitive
def encode_e4m3(rows: Any, tall: int, wide: int, scales: Any, codes: Any) -> None:
    """E4M3 codes of blocks.

    Args:
        rows, tall, wide: as of `block_largest`.
        scales: numpy float32 [blocks down, blocks across].
        codes: numpy uint8 like `rows`, filled.
    """
    import numpy as np

    code = e4m3_codes(np.abs(rows / _each(scales, rows, tall, wide))) | _signs(rows)
    codes[:] = np.where(np.isfinite(rows), code, _NAN)


@encode_e4m3.compiled
def _encode_e4m3_compiled(rows: Any, tall: int, wide: int, scales: Any, codes: Any) -> None:
    from merge_cli.kernels import compiled

    compiled.encode_e4m3(rows, tall, wide, scales, codes)


@host_primitive
def encode_e5m2(rows: Any, tall: int, wide: int, scales: Any, codes: Any) -> None:
    """E5M2 codes of blocks, as `encode_e4m3`; Inf stays Inf."""
    import numpy as np

    quotient = np.abs(rows / _each(scales, rows, tall, wide))
    code = _small_floats(quotient, 2, 15, LARGEST_E5M2)
    code = np.where(np.isinf(rows), np.uint8(_INFINITY_E5M2), code) | _signs(rows)
    codes[:] = np.where(np.isnan(rows), _NAN, code)


@encode_e5m2.compiled
def _encode_e5m2_compiled(rows: Any, tall: int, wide: int, scales: Any, codes: Any) -> None:
    from merge_cli.kernels import compiled

    compiled.encode_e5m2(rows, tall, wide, scales, codes)


def _each(scales: Any, rows: Any, tall: int, wide: int) -> Any:
    """The scale of each number."""
    return scales.repeat(tall, 0)[: len(rows)].repeat(wide, 1)[:, : rows.shape[1]]


def _signs(rows: Any) -> Any:
    """The sign bit of codes of eight bits."""
    import numpy as np

    return np.where(np.signbit(rows), 0x80, 0).astype(np.uint8)


@host_primitive
def group_extremes(values: Any, above: Any, below: Any) -> None:
    """How far each group reaches above and below zero.

    Args:
        values: numpy float32 [groups, size].
        above: numpy float32 [groups], filled: the largest value, at least 0.
        below: the same of the values with the other sign. Of a group with a number that is not
            finite, one of both is not finite either.
    """
    import numpy as np

    bits = np.ascontiguousarray(values).view(np.int32)
    above.view(np.int32)[:] = bits.max(axis=1, initial=0)
    below.view(np.int32)[:] = (bits ^ np.int32(-(2**31))).max(axis=1, initial=0)


@group_extremes.compiled
def _group_extremes_compiled(values: Any, above: Any, below: Any) -> None:
    from merge_cli.kernels import compiled

    compiled.group_extremes(values, above, below)


@host_primitive
def encode_e2m1(values: Any, scales: Any, codes: Any) -> None:
    """E2M1 codes of groups, two in a byte, the first in the lower four bits.

    Args:
        values: numpy float32 [groups, size], of an even size.
        scales: numpy float32 [groups].
        codes: numpy uint8 [groups, size / 2], filled.
    """
    import numpy as np

    quotient = np.abs(values / scales[:, None])
    code = np.where(np.signbit(values), 8, 0).astype(np.uint8)
    # Halfway numbers go to the even code.
    for number, threshold in enumerate((0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)):
        code += quotient >= threshold if number % 2 else quotient > threshold
    codes[:] = _paired(code)


@encode_e2m1.compiled
def _encode_e2m1_compiled(values: Any, scales: Any, codes: Any) -> None:
    from merge_cli.kernels import compiled

    compiled.encode_e2m1(values, scales, codes)


@host_primitive
def encode_int4(values: Any, scales: Any, zeros: Any, codes: Any) -> None:
    """Integers of four bits, stored from 0 on for -8, two in a byte.

    Args:
        values, scales, codes: as of `encode_e2m1`.
        zeros: numpy float32 [groups]: whole numbers, added to value / scale.
    """
    import numpy as np

    moved = values / scales[:, None] + zeros[:, None]
    moved = np.where(moved < 7, moved, np.float32(7))
    moved = np.where(moved > -8, moved, np.float32(-8))
    codes[:] = _paired((np.rint(moved) + 8).astype(np.uint8))


@encode_int4.compiled
def _encode_int4_compiled(values: Any, scales: Any, zeros: Any, codes: Any) -> None:
    from merge_cli.kernels import compiled

    compiled.encode_int4(values, scales, zeros, codes)


@host_primitive
def encode_affine(values: Any, scales: Any, biases: Any, largest: float, codes: Any) -> None:
    """Whole numbers from 0 to `largest` that stand for code * scale + bias of their group.

    Args:
        values: numpy float32 [groups, size].
        scales, biases: numpy float32 [groups].
        codes: numpy uint8 like `values`, filled.
    """
    import numpy as np

    moved = (values - biases[:, None]) / scales[:, None]
    moved = np.where(moved > 0, moved, np.float32(0))
    codes[:] = np.rint(np.where(moved < largest, moved, np.float32(largest)))


@encode_affine.compiled
def _encode_affine_compiled(
    values: Any, scales: Any, biases: Any, largest: float, codes: Any
) -> None:
    import numpy as np

    from merge_cli.kernels import compiled

    compiled.encode_affine(values, scales, biases, np.float32(largest), codes)


def _paired(code: Any) -> Any:
    return code[:, ::2] | code[:, 1::2] << 4
