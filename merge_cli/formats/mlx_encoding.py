"""MLX's forms as they are written: affine codes of 2 to 8 bits, and numbers of four bits.

Of the affine mode the scale brings a group's range to the codes, and the bias is the end of the
range that is farther from zero, so that zero is a code (`mlx.core.quantize`). Both are rounded to
their dtype first, and codes are computed with what is stored. A group with NaN or Inf is NaN.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merge_cli.checkpoint.dtypes import width_of
from merge_cli.formats.encoding import Encoding, Part, Tiles, changed_groups, rounded
from merge_cli.formats.fp4_encoding import Fp4Encoding, mx_exponents
from merge_cli.formats.small_floats import numbers_of
from merge_cli.kernels.quantise import LARGEST_E2M1, e4m3_codes, encode_affine

_LEAST_SCALE = 1e-7
_WORD = 32  # bits


class _MlxEncoding(Encoding):
    """What all modes share: parts of a module, described by the config that the model came with."""

    group: int

    @property
    def family(self) -> str:
        return "mlx"

    def settings(
        self, groups: Mapping[Encoding, Sequence[str]], unconverted: Sequence[str]
    ) -> dict[str, Any]:
        raise AssertionError("no word of out_dtype writes MLX: the reference's config is kept")

    def unfit(self, shape: tuple[int, ...]) -> str:
        if len(shape) < 2 or shape[-1] % self.group or self.group % 8:
            return f"rows of {shape[-1:]} columns are no groups of {self.group}, in eights"
        return ""


@dataclass(frozen=True)
class MlxAffineEncoding(_MlxEncoding):
    """Whole numbers times a scale, plus a bias, for each group of columns.

    Attributes:
        bits: of a code.
        group: columns that share a scale and a bias.
        dtype: of both.
    """

    bits: int
    group: int
    dtype: str

    @property
    def label(self) -> str:
        return f"MLX codes of {self.bits} bits"

    @property
    def described(self) -> str:
        return f"a scale and a bias for each {self.group} columns of a row"

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        *rows, columns = shape
        words, grid = columns * self.bits // _WORD, (*rows, columns // self.group)
        width = width_of(self.dtype)
        return (
            Part("", "U32", (*rows, words), self.group, self.group * self.bits // 8),
            Part(".scales", self.dtype, grid, self.group, width, of_module=True),
            Part(".biases", self.dtype, grid, self.group, width, of_module=True),
        )

    def tile(self, shape: tuple[int, ...]) -> int:
        return self.group

    def encode(self, tiles: Tiles, stored: Sequence[Any]) -> None:
        import numpy as np

        groups = tiles.values.reshape(-1, self.group)
        changed = changed_groups(groups, tiles.before)
        chosen = groups[changed]
        scales, biases = self._scales(chosen)
        codes, largest = np.empty(chosen.shape, np.uint8), float(2**self.bits - 1)
        raw_scales, scales = rounded(scales, self.dtype)
        raw_biases, biases = rounded(biases, self.dtype)
        encode_affine(chosen, scales, biases, largest, codes)
        width = self.group * self.bits // 8
        stored[0].reshape(-1, width)[changed] = _packed(codes, self.bits).reshape(-1, width)
        for part, raw in ((stored[1], raw_scales), (stored[2], raw_biases)):
            width = width_of(self.dtype)
            part.reshape(-1, width)[changed] = raw.reshape(-1, width)

    def _scales(self, groups: Any) -> tuple[Any, Any]:
        """Scales and biases of groups: numpy float32 [groups]."""
        import numpy as np

        low, high = groups.min(axis=1), groups.max(axis=1)
        steps = np.float32(2**self.bits - 1)
        with np.errstate(invalid="ignore", over="ignore"):
            span = high - low
            step = np.where(np.isfinite(span), span / steps, high / steps - low / steps)
            scale = np.maximum(step, np.float32(_LEAST_SCALE))
            reaches_down = np.abs(low) > np.abs(high)
            scale = np.where(reaches_down, scale, -scale)
            edge = np.where(reaches_down, low, high)
            whole = np.rint(edge / scale)
            is_zero = whole == 0
            scale = np.where(is_zero, scale, edge / np.where(is_zero, np.float32(1), whole))
            broken = ~(np.isfinite(low) & np.isfinite(high) & np.isfinite(scale))
        scale = np.where(broken, np.float32("nan"), scale).astype(np.float32)
        return scale, np.where(is_zero | broken, np.float32(0), edge).astype(np.float32)


@dataclass(frozen=True)
class MlxFp4Encoding(_MlxEncoding, Fp4Encoding):
    """Numbers of four bits with a byte for each group: an exponent (mxfp4) or an E4M3 (nvfp4).

    Attributes:
        group: columns that share a scale.
        mode: mxfp4 or nvfp4.
    """

    group: int
    mode: str

    @property
    def label(self) -> str:
        return f"MLX {self.mode}"

    @property
    def described(self) -> str:
        return f"a scale for each {self.group} columns of a row"

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        *rows, columns = shape
        grid = (*rows, columns // self.group)
        return (
            Part("", "U32", (*rows, columns // 8), 8, 4),
            Part(".scales", "U8", grid, self.group, 1, of_module=True),
        )

    def group_scales(self, largest: Any, scale: float) -> tuple[Any, Any]:
        import numpy as np

        if self.mode == "mxfp4":
            exponents = mx_exponents(largest)
            return exponents, numbers_of("F8_E8M0")[exponents]
        # Without a scale of the tensor, the least one must do for what is smaller.
        raw = np.maximum(e4m3_codes(largest / np.float32(LARGEST_E2M1)), np.uint8(1))
        raw = np.where(np.isnan(largest), np.uint8(0x7F), raw)
        return raw, numbers_of("F8_E4M3")[raw]


def _packed(codes: Any, bits: int) -> Any:
    """Codes one after another, the first in the lowest bits.

    Args:
        codes: numpy uint8, as many as are whole eights.

    Returns:
        the bytes in their order: numpy uint8 of any shape.
    """
    import numpy as np

    if bits == 8:
        return codes
    # Eight codes are as many bytes as a code has bits.
    eights = codes.reshape(-1, 8).astype(np.uint64)
    words = np.zeros(len(eights), np.uint64)
    for number in range(8):
        words |= eights[:, number] << np.uint64(number * bits)
    return words[:, None].view(np.uint8)[:, :bits]  # words begin with their lowest byte
