"""Integers of four bits as they are written: packed, with scales by groups, for compressed-tensors.

The scale is the largest magnitude of a group over 7.5; with zero points, the range of its values
and nought over 15, both as compressed-tensors computes them. A group with NaN or Inf is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from merge_cli.checkpoint.dtypes import width_of
from merge_cli.formats.encoding import Part, Tiles, changed_groups, rounded_scales
from merge_cli.formats.packed import unpack
from merge_cli.formats.schemes import STACKED, CompressedTensorsEncoding
from merge_cli.kernels.quantise import encode_int4, group_extremes

_LEAST = 2.0**-23  # the scale of a group of zeros, as in compressed-tensors


@dataclass(frozen=True)
class Int4Encoding(CompressedTensorsEncoding):
    """Packed integers of four bits. See the module.

    Attributes:
        group: columns that share a scale; 0 for a whole row.
        symmetric: without zero points.
        dtype: of the scales.
        dimensions: of the weights: 2, or 3 of stacked experts.
    """

    group: int = 128
    symmetric: bool = True
    dtype: str = "BF16"
    dimensions: int = 2

    @property
    def label(self) -> str:
        return "INT4"

    @property
    def described(self) -> str:
        zeros = "" if self.symmetric else " and a zero point"
        of = f"each {self.group} columns of a row" if self.group else "each row"
        return f"a scale{zeros} for {of}"

    @property
    def kind(self) -> str:
        return "pack-quantized"

    @property
    def scheme(self) -> dict[str, Any]:
        return {
            "dynamic": False,
            "group_size": self.group or None,
            "num_bits": 4,
            "strategy": "group" if self.group else "channel",
            "symmetric": self.symmetric,
            "type": "int",
        }

    def unfit(self, shape: tuple[int, ...]) -> str:
        if len(shape) != self.dimensions:
            return STACKED
        multiple = self.group or 8
        if shape[-1] % multiple or multiple % 8:
            return f"{shape[-1]} columns are no multiple of the group of {multiple}"
        if len(shape) > 2 and not self.symmetric and shape[-2] % 8:
            return f"{shape[-2]} rows of zero points do not fill words of eight"
        return ""

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        size, width = max(1, math.prod(shape)), width_of(self.dtype)
        *rows, columns = shape
        group = self.group or columns
        across = columns // group
        parts = [
            Part("_packed", "I32", (*rows, columns // 8), 8, 4),
            Part("_scale", self.dtype, (*rows, across), group, width),
            Part("_shape", "I64", (len(shape),), size, 8 * len(shape)),
        ]
        if not self.symmetric:
            lines = (*rows[:-1], -(-rows[-1] // 8), across)
            parts.append(Part("_zero_point", "I32", lines, 8 * columns, 4 * across))
        return tuple(parts)

    def tile(self, shape: tuple[int, ...]) -> int:
        # A word of zero points is of the same group in eight rows.
        return (self.group or shape[-1]) if self.symmetric else 8 * shape[-1]

    def encode(self, tiles: Tiles, stored: Sequence[Any]) -> None:
        import numpy as np

        columns = tiles.shape[-1]
        group = self.group or columns
        groups = tiles.values.reshape(-1, group)
        changed = changed_groups(groups, tiles.before)
        chosen = groups[changed]
        raw, scales, zeros = self._scales(chosen)
        packed = np.empty((len(chosen), group // 2), np.uint8)
        encode_int4(chosen, scales, zeros, packed)
        width = width_of(self.dtype)
        stored[0].reshape(-1, group // 2)[changed] = packed
        stored[1].reshape(-1, width)[changed] = raw.reshape(-1, width)
        stored[2][:] = np.array(tiles.shape, np.int64).view(np.uint8)
        if not self.symmetric:
            across = columns // group
            points = np.zeros((-(-len(groups) // across // 8) * 8, across), np.uint8)
            if tiles.before is not None:
                points[:] = _unpacked_zeros(stored[3], across)
            points.reshape(-1)[: len(groups)][changed] = (zeros + 8).astype(np.uint8)
            stored[3][:] = _packed_zeros(points)

    def _scales(self, groups: Any) -> tuple[Any, Any, Any]:
        """Scales as bytes and as numbers, and zero points, of groups: numpy [groups]."""
        import numpy as np

        above, below = np.empty((2, len(groups)), np.float32)
        group_extremes(groups, above, below)
        broken = ~(np.isfinite(above) & np.isfinite(below))  # a group with NaN or Inf is NaN
        zeros: Any = np.zeros(len(groups), np.float32)
        exact: Any
        if self.symmetric:
            exact = np.maximum(above, below) / np.float32(7.5)
        else:
            exact = (above + below) / np.float32(15)
            divisor = np.where(exact > 0, exact, np.float32(1))
            zeros = np.rint(np.clip(np.float32(-8) + below / divisor, -8, 7))
            zeros = np.where(broken | (exact == 0), np.float32(0), zeros)
        exact = np.where(exact == 0, np.float32(_LEAST), exact)
        exact = np.where(broken, np.float32("nan"), exact)
        raw, scales = rounded_scales(np.ascontiguousarray(exact), self.dtype)
        return raw, scales, zeros


def _packed_zeros(points: Any) -> Any:
    """Zero points, eight rows in a word: numpy uint8 [rows, groups] -> bytes, flat."""
    import numpy as np

    lines = points.reshape(-1, 8, points.shape[1]).transpose(0, 2, 1)
    return np.ascontiguousarray(lines[..., ::2] | lines[..., 1::2] << 4).reshape(-1)


def _unpacked_zeros(raw: Any, across: int) -> Any:
    """The reverse."""
    lines = unpack(raw.reshape(-1, across, 4), 4)
    return lines.transpose(0, 2, 1).reshape(-1, across)
