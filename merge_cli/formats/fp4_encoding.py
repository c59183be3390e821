"""Numbers of four bits (E2M1) as they are written: NVFP4 and MXFP4, by rows.

NVFP4: the scale of the tensor brings its largest magnitude to 6 (E2M1's) times 448 (E4M3's), the
scale of a group is its largest magnitude over 6 in that measure, rounded to E4M3. MXFP4: the scale
is the power of two of the group's largest magnitude, over 4, E2M1's largest power of two; numbers
beyond 6 become 6 (OCP MX 1.0, section 6.3). A group with NaN or Inf is NaN.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merge_cli.formats.encoding import Encoding, Part, Tiles, changed_groups
from merge_cli.formats.schemes import STACKED, CompressedTensorsEncoding
from merge_cli.formats.small_floats import numbers_of
from merge_cli.kernels.quantise import (
    LARGEST_E2M1,
    LARGEST_E4M3,
    e4m3_codes,
    encode_e2m1,
    group_extremes,
)

GROUP = 16  # columns that share a scale in NVFP4
MX_GROUP = 32  # and in MXFP4
_LEAST_E4M3 = 0x20  # 0.125: the scale of a group of zeros, as in compressed-tensors
_NAN_E4M3, _NAN_E8M0 = 0x7F, 0xFF
_ROOM = 1 + 1 / 64  # what E4M3 still rounds to its largest number


def group_magnitudes(groups: Any) -> Any:
    """The largest magnitude of each group; NaN where one is not finite.

    Args:
        groups: numpy float32 [groups, size].
    """
    import numpy as np

    above, below = np.empty((2, len(groups)), np.float32)
    group_extremes(groups, above, below)
    largest = np.maximum(above, below)
    return np.where(np.isfinite(largest), largest, np.float32("nan"))


def mx_exponents(largest: Any) -> Any:
    """E8M0 scales of groups with these largest magnitudes: numpy float32 -> uint8."""
    import numpy as np

    exponents = (largest.view(np.uint32) >> 23).astype(np.int32) & 0xFF
    return np.where(np.isnan(largest), _NAN_E8M0, np.maximum(exponents - 2, 0)).astype(np.uint8)


def _scheme(group: int, strategy: str, scale_dtype: str) -> dict[str, Any]:
    """How compressed-tensors describes weights of four bits in config.json."""
    return {
        "dynamic": False,
        "group_size": group,
        "num_bits": 4,
        "scale_dtype": scale_dtype,
        "strategy": strategy,
        "symmetric": True,
        "type": "float",
    }


class Fp4Encoding(Encoding):
    """E2M1 codes of rows, in groups."""

    group: int

    def unfit(self, shape: tuple[int, ...]) -> str:
        if len(shape) != 2:
            return STACKED
        if shape[-1] % self.group:
            return f"{shape[-1]} columns are no multiple of the group of {self.group}"
        return ""

    def tile(self, shape: tuple[int, ...]) -> int:
        return self.group

    def encode(self, tiles: Tiles, stored: Sequence[Any]) -> None:
        import numpy as np

        groups, before = tiles.values.reshape(-1, self.group), tiles.before
        whole = np.array([tiles.scale], np.float32).view(np.uint8)
        if self.whole and not np.array_equal(stored[2], whole):
            before = None  # codes stay only under the scale that they have been made with
        changed = changed_groups(groups, before)
        chosen = groups[changed]
        raw, scales = self.group_scales(group_magnitudes(chosen), tiles.scale)
        packed = np.empty((len(chosen), self.group // 2), np.uint8)
        encode_e2m1(chosen, scales, packed)
        stored[0].reshape(-1, self.group // 2)[changed] = packed
        stored[1][changed] = raw
        if self.whole:
            stored[2][:] = whole

    @abstractmethod
    def group_scales(self, largest: Any, scale: float) -> tuple[Any, Any]:
        """Scales of groups as bytes, and what values are divided by: numpy [groups]."""


class _Nvfp4Encoding(Fp4Encoding):
    """Groups of 16, and a scale of the tensor."""

    group = GROUP

    @property
    def label(self) -> str:
        return "NVFP4"

    @property
    def whole(self) -> bool:
        return True

    @property
    def described(self) -> str:
        return f"a scale for each {GROUP} columns of a row, and one for each matrix"


@dataclass(frozen=True)
class CompressedNvfp4Encoding(_Nvfp4Encoding, CompressedTensorsEncoding):
    """NVFP4 as compressed-tensors writes it: the scale of the tensor divides.

    Attributes:
        scalar: its shape.
    """

    scalar: tuple[int, ...] = (1,)

    @property
    def kind(self) -> str:
        return "nvfp4-pack-quantized"

    @property
    def scheme(self) -> dict[str, Any]:
        return _scheme(GROUP, "tensor_group", "torch.float8_e4m3fn")

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        rows, columns = shape
        return (
            Part("_packed", "U8", (rows, columns // 2), 2, 1),
            Part("_scale", "F8_E4M3", (rows, columns // GROUP), GROUP, 1),
            Part("_global_scale", "F32", self.scalar, max(1, math.prod(shape)), 4),
        )

    def tensor_scale(self, largest: float, stored: Sequence[Any]) -> float:
        import numpy as np

        if stored:
            before = float(stored[2].view(np.float32)[0])
            needed = largest / LARGEST_E2M1 * before
            if 0 < before < math.inf and needed <= LARGEST_E4M3 * _ROOM:
                return before
        if not largest:
            return 1.0
        scale = np.float32(LARGEST_E4M3 * LARGEST_E2M1) / np.float32(largest)
        return float(scale) if np.isfinite(scale) else 1.0

    def group_scales(self, largest: Any, scale: float) -> tuple[Any, Any]:
        import numpy as np

        raw = _e4m3_scales(np.float32(scale) * (largest / np.float32(LARGEST_E2M1)))
        return raw, numbers_of("F8_E4M3")[raw] / np.float32(scale)


@dataclass(frozen=True)
class ModelOptEncoding(_Nvfp4Encoding):
    """NVFP4 as ModelOpt writes it: the scale of the tensor multiplies.

    Attributes:
        scalar: its shape.
    """

    scalar: tuple[int, ...] = ()

    @property
    def family(self) -> str:
        return "modelopt"

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        rows, columns = shape
        return (
            Part("", "U8", (rows, columns // 2), 2, 1),
            Part("_scale", "F8_E4M3", (rows, columns // GROUP), GROUP, 1),
            Part("_scale_2", "F32", self.scalar, max(1, math.prod(shape)), 4),
        )

    def tensor_scale(self, largest: float, stored: Sequence[Any]) -> float:
        import numpy as np

        if stored:
            before = float(stored[2].view(np.float32)[0])
            if 0 < before < math.inf and largest <= before * LARGEST_E2M1 * LARGEST_E4M3 * _ROOM:
                return before
        scale = np.float32(largest) / np.float32(LARGEST_E4M3 * LARGEST_E2M1)
        return float(scale) if scale > 0 else 1.0

    def group_scales(self, largest: Any, scale: float) -> tuple[Any, Any]:
        import numpy as np

        raw = _e4m3_scales(largest / np.float32(LARGEST_E2M1) / np.float32(scale))
        return raw, numbers_of("F8_E4M3")[raw] * np.float32(scale)

    def settings(
        self, groups: Mapping[Encoding, Sequence[str]], unconverted: Sequence[str]
    ) -> dict[str, Any]:
        weights = {"dynamic": False, "group_size": GROUP, "num_bits": 4, "type": "float"}
        return {
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
            "ignore": list(unconverted),
            "quant_algo": "NVFP4",
            "quant_method": "modelopt",
        }


@dataclass(frozen=True)
class MxEncoding(Fp4Encoding, CompressedTensorsEncoding):
    """MXFP4 by rows, as compressed-tensors writes it.

    Attributes:
        dtype: of the exponents: U8 or F8_E8M0.
    """

    dtype: str = "U8"
    group = MX_GROUP

    @property
    def label(self) -> str:
        return "MXFP4"

    @property
    def described(self) -> str:
        return f"an exponent for each {MX_GROUP} columns of a row"

    @property
    def kind(self) -> str:
        return "mxfp4-pack-quantized"

    @property
    def scheme(self) -> dict[str, Any]:
        return _scheme(MX_GROUP, "group", "torch.uint8")

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        rows, columns = shape
        return (
            Part("_packed", "U8", (rows, columns // 2), 2, 1),
            Part("_scale", self.dtype, (rows, columns // MX_GROUP), MX_GROUP, 1),
        )

    def group_scales(self, largest: Any, scale: float) -> tuple[Any, Any]:
        exponents = mx_exponents(largest)
        return exponents, numbers_of("F8_E8M0")[exponents]


def _e4m3_scales(scales: Any) -> Any:
    """Scales in E4M3: numpy float32 from 0 on -> uint8; nought becomes the least that is used."""
    import numpy as np

    raw = np.where(np.isnan(scales), _NAN_E4M3, e4m3_codes(scales)).astype(np.uint8)
    return np.where(raw == 0, np.uint8(_LEAST_E4M3), raw)
