"""fp8 as it is written: E4M3 or E5M2 codes, with a scale for each block, row or tensor.

A scale is the largest magnitude over the largest number of the codes (448 and 57,344), in the dtype
of scales; of zeros it is 1. NaN and Inf do not count for it. E4M3 has no Inf: it becomes NaN.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merge_cli.checkpoint.dtypes import width_of
from merge_cli.formats.encoding import Encoding, Part, Tiles, rounded_scales
from merge_cli.formats.schemes import STACKED, CompressedTensorsEncoding
from merge_cli.formats.small_floats import numbers_of
from merge_cli.kernels.quantise import (
    LARGEST_E4M3,
    LARGEST_E5M2,
    block_largest,
    encode_e4m3,
    encode_e5m2,
)

_LARGEST = {"F8_E4M3": LARGEST_E4M3, "F8_E5M2": LARGEST_E5M2}
_ENCODERS = {"F8_E4M3": encode_e4m3, "F8_E5M2": encode_e5m2}
_FLOAT8 = {"num_bits": 8, "symmetric": True, "type": "float"}


@dataclass(frozen=True)
class Fp8Encoding(Encoding):
    """Codes of eight bits with a scale for each block, row or tensor.

    Attributes:
        tall, wide: rows and columns that share a scale; 0 for all of them.
        suffix: of the scales' name; empty for codes without scales.
        dtype: of the scales; exponents alone as F8_E8M0 or U8.
        scalar: the shape of a scale of the tensor.
        powers: scales are powers of two, whatever their dtype.
        codes: F8_E4M3 or F8_E5M2.
    """

    tall: int
    wide: int
    suffix: str = "_scale_inv"
    dtype: str = "F32"
    scalar: tuple[int, ...] = ()
    powers: bool = False
    codes: str = "F8_E4M3"

    @property
    def family(self) -> str:
        return "fp8"

    @property
    def label(self) -> str:
        return self.codes

    @property
    def whole(self) -> bool:
        return not self.tall and bool(self.suffix)

    @property
    def described(self) -> str:
        if not self.suffix:
            return "no scale"
        if not self.tall:
            return "a scale for each matrix"
        return (
            f"a scale for each {self.tall} x {self.wide}" if self.wide else "a scale for each row"
        )

    def unfit(self, shape: tuple[int, ...]) -> str:
        if len(shape) < 2 or (len(shape) > 2 and shape[-2] % max(1, self.tall)):
            return f"blocks of {self.tall} rows must divide the rows of each expert"
        return ""

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        size, width = max(1, math.prod(shape)), width_of(self.dtype)
        codes = Part("", self.label, shape, 1, 1)
        if not self.suffix:
            return (codes,)
        of_module = self.suffix.startswith(".")
        if not self.tall:
            return codes, Part(self.suffix, self.dtype, self.scalar, size, width, of_module)
        across = -(-shape[-1] // self.wide) if self.wide else 1
        grid = (*shape[:-2], -(-shape[-2] // self.tall), across)
        elements = self.tall * shape[-1]
        return codes, Part(self.suffix, self.dtype, grid, elements, across * width, of_module)

    def tile(self, shape: tuple[int, ...]) -> int:
        return self.tall * shape[-1] if self.tall else 1

    def tensor_scale(self, largest: float, stored: Sequence[Any]) -> float:
        if stored:
            before = float(_numbers(stored[1], self.dtype)[0])
            if 0 < largest <= before * _LARGEST[self.codes]:
                return before
        import numpy as np

        return float(self._scales(np.array([largest], np.float32))[1][0])

    def encode(self, tiles: Tiles, stored: Sequence[Any]) -> None:
        if not self.tall:
            self._encode_alike(tiles, stored)
            return
        import numpy as np

        rows = tiles.values.reshape(-1, tiles.shape[-1])
        codes, encode = stored[0].reshape(rows.shape), _ENCODERS[self.codes]
        wide = self.wide or tiles.shape[-1]
        blocks = np.empty((-(-len(rows) // self.tall), -(-tiles.shape[-1] // wide)), np.float32)
        block_largest(rows, self.tall, wide, blocks)
        raw, scales = self._scales(blocks)
        if tiles.before is None:
            encode(rows, self.tall, wide, scales, codes)
            stored[1][:] = raw
            return
        differs = (rows != tiles.before.reshape(rows.shape)).astype(np.float32)
        block_largest(differs, self.tall, wide, blocks)
        made = np.empty(rows.shape, np.uint8)
        encode(rows, self.tall, wide, scales, made)
        changed = blocks > 0
        each = changed.repeat(self.tall, 0)[: len(rows)].repeat(wide, 1)[:, : tiles.shape[-1]]
        np.copyto(codes, made, where=each)
        by_block = stored[1].reshape(changed.size, -1)
        by_block[changed.reshape(-1)] = raw.reshape(by_block.shape)[changed.reshape(-1)]

    def _encode_alike(self, tiles: Tiles, stored: Sequence[Any]) -> None:
        """With the scale of the tensor, or without one."""
        import numpy as np

        values, scale = tiles.values, np.array([[tiles.scale]], np.float32)
        made = np.empty(len(values), np.uint8)
        _ENCODERS[self.codes](values[None], 1, len(values), scale, made[None])
        raw = self._scales(scale[0], exact=True)[0] if self.suffix else None
        if tiles.before is None:
            stored[0][:] = made
        else:  # codes stay only under the scale that they have been made with
            is_kept = raw is None or np.array_equal(raw, stored[1])
            np.copyto(stored[0], made, where=(values != tiles.before) | (not is_kept))
        if raw is not None:
            stored[1][:] = raw

    def _scales(self, largest: Any, *, exact: bool = False) -> tuple[Any, Any]:
        """Scales as bytes and as numbers.

        Args:
            largest: numpy float32: of each block; the scales themselves with `exact`.
        """
        import numpy as np

        scales = largest
        if not exact:
            # No quotient by a smaller scale than this would be within the format.
            scales = np.maximum(largest / np.float32(_LARGEST[self.codes]), np.float32(2.0**-126))
            scales = np.where(largest > 0, scales, np.float32(1))
        if self.powers and not exact:  # the next one, so that nothing is cut off
            fraction, exponent = np.frexp(scales)
            scales = np.ldexp(np.float32(1), exponent - (fraction == 0.5))
        if self.dtype in ("U8", "F8_E8M0"):
            exponents = (scales.view(np.uint32) >> 23).astype(np.uint8)
            return exponents.reshape(-1), scales
        return rounded_scales(np.ascontiguousarray(scales), self.dtype)

    def settings(
        self, groups: Mapping[Encoding, Sequence[str]], unconverted: Sequence[str]
    ) -> dict[str, Any]:
        return {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "modules_to_not_convert": list(unconverted),
            "quant_method": "fp8",
            "weight_block_size": [self.tall, self.wide],
        }


@dataclass(frozen=True)
class CompressedFp8Encoding(Fp8Encoding, CompressedTensorsEncoding):
    """The same as compressed-tensors describes it; activations are quantised by token."""

    family = CompressedTensorsEncoding.family
    settings = CompressedTensorsEncoding.settings

    def unfit(self, shape: tuple[int, ...]) -> str:
        return "" if len(shape) == 2 else STACKED

    @property
    def kind(self) -> str:
        return "float-quantized"

    @property
    def scheme(self) -> dict[str, Any]:
        strategy = "channel" if self.tall else "tensor"
        return {"dynamic": False, "strategy": strategy, **_FLOAT8}

    @property
    def activations(self) -> dict[str, Any]:
        return {"dynamic": True, "strategy": "token", **_FLOAT8}


def _numbers(raw: Any, dtype: str) -> Any:
    """Stored scales as numpy float32.

    Args:
        raw: their bytes, numpy uint8.
    """
    import numpy as np

    if dtype in ("U8", "F8_E8M0"):
        return numbers_of("F8_E8M0")[raw]
    if dtype == "BF16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return raw.view({"F16": np.float16, "F32": np.float32}[dtype]).astype(np.float32)
