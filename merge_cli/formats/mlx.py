"""MLX: codes of 2 to 8 bits with a scale and a bias for each group of columns; MXFP4 and NVFP4.

`NAME.weight` (U32 [..., rows, columns * bits / 32], codes by rows, the first in the lowest bits),
`NAME.scales` and, of the affine mode, `NAME.biases` ([..., rows, columns / group_size]). A number
is code * scale + bias. In the modes mxfp4 and nvfp4, codes are E2M1 and scales are bytes (E8M0,
E4M3). `quantization` of config.json says how large groups are, of all modules or of one by its
name.

The formula is that of `mlx.core.dequantize`. How it is written is in formats/mlx_encoding.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from merge_cli.checkpoint.headers import TensorRef
from merge_cli.checkpoint.tensors import Read, read_numbers
from merge_cli.errors import SourceError
from merge_cli.formats.encoding import Encoding
from merge_cli.formats.grouped_integers import read_modules, reject_conv1d
from merge_cli.formats.mlx_encoding import MlxAffineEncoding, MlxFp4Encoding
from merge_cli.formats.packed import PackedRows, unpack
from merge_cli.formats.small_floats import fp4_numbers, numbers_of
from merge_cli.formats.storage_format import DecodedModel, quant_method, usual_dtype
from merge_cli.formats.stored_parts import corrupt, of_shape, read_integers, required
from merge_cli.kernels.codes import scale_groups

_KEY = "quantization"  # of config.json
_BITS = (2, 3, 4, 5, 6, 8)
_SCALES = {"mxfp4": "F8_E8M0", "nvfp4": "F8_E4M3"}  # what the bytes of a mode's scales are
_FLOATS = ("F32", "F16", "BF16")
_ENDINGS = (".scales", ".biases")


class Mlx:
    """The format. See `StorageFormat`."""

    name = "MLX"

    def detect(self, tensors: Mapping[str, TensorRef], config: Mapping[str, Any]) -> bool:
        stated = isinstance(config.get(_KEY), dict) and not quant_method(config)
        return stated and any(ref.dtype == "U32" for ref in tensors.values())

    def decode(
        self, tensors: Mapping[str, TensorRef], config: Mapping[str, Any], label: str
    ) -> DecodedModel:
        default_dtype, quantization = usual_dtype(config), config[_KEY]
        reject_conv1d(config, label, self.name)

        def weight(codes: TensorRef) -> MlxTensor:
            return _weight(codes, tensors, quantization, default_dtype, label)

        packed = [ref for ref in tensors.values() if ref.dtype == "U32"]
        return read_modules(
            tensors, config, packed, weight, name=self.name, endings=_ENDINGS, key=_KEY
        )


MLX = Mlx()


@dataclass(frozen=True)
class MlxTensor(PackedRows):
    """A weight in groups of columns.

    Attributes:
        bits: of a code.
        mode: affine, mxfp4 or nvfp4.
        biases: of the groups; None in other modes than affine.
    """

    bits: int
    mode: str
    scales: TensorRef
    biases: TensorRef | None

    @property
    def stored(self) -> tuple[TensorRef, ...]:
        return (self.codes, self.scales, *([self.biases] if self.biases is not None else []))

    @property
    def formula(self) -> str:
        return f"MLX, {self.mode}, {self.bits} bits, {self.scales.shape[-1]} groups"

    @property
    def encoding(self) -> Encoding | str:
        group = self.shape[-1] // self.scales.shape[-1]
        encoding: Encoding = MlxFp4Encoding(group, self.mode)
        if self.biases is not None:
            if self.biases.dtype != self.scales.dtype:
                return f"MLX with scales in {self.scales.dtype} and other biases is not written"
            encoding = MlxAffineEncoding(self.bits, group, self.scales.dtype)
        return encoding.unfit(self.shape) or encoding

    def rows(self, read: Read, first: int, last: int) -> Any:
        import numpy as np

        count, columns, groups = last - first, self.shape[-1], self.scales.shape[-1]
        words = self.codes.shape[-1]
        raw = read_integers(read, self.codes, first * words, count * words)
        raw = raw.view(np.uint8).reshape(count, -1)
        start, size = first * groups, count * groups
        if self.biases is None:
            stored = read_integers(read, self.scales, start, size)
            scales = numbers_of(_SCALES[self.mode])[stored].reshape(count, groups)
            numbers = fp4_numbers(raw)
            scale_groups(numbers, scales)
            return numbers
        numbers = unpack(raw, self.bits)[:, :columns].astype(np.float32)
        scale_groups(numbers, read_numbers(read, self.scales, start, size).reshape(count, groups))
        biases = read_numbers(read, self.biases, start, size).reshape(count, groups, 1)
        numbers.reshape(count, groups, -1)[:] += biases
        return numbers


def _weight(
    codes: TensorRef,
    tensors: Mapping[str, TensorRef],
    quantization: Mapping[str, Any],
    default_dtype: str,
    label: str,
) -> MlxTensor:
    """A weight, its parts checked against one another.

    Raises:
        CorruptFileError: parts that do not fit, or are not there.
        SourceError: a mode, or a number of bits, that is not read.
    """
    module = codes.name.removesuffix(".weight")
    bits, group, mode = _scheme(quantization, module, label)
    if len(codes.shape) < 2 or codes.shape[-1] * 32 % (bits * group):
        message = f"U32 of shape {list(codes.shape)} are no groups of {group} codes of {bits} bits"
        raise corrupt(message, codes)
    columns = codes.shape[-1] * 32 // bits
    grid, why = (*codes.shape[:-1], columns // group), f"'{codes.name}'"
    affine = mode == "affine"
    scales = required(tensors, f"{module}.scales", codes)
    of_shape(scales, _FLOATS if affine else ("U8",), grid, why=why)
    biases = required(tensors, f"{module}.biases", codes) if affine else None
    if biases is not None:
        of_shape(biases, _FLOATS, grid, why=why)
    shape = (*codes.shape[:-1], columns)
    return MlxTensor(codes.name, codes, shape, default_dtype, bits, mode, scales, biases)


def _scheme(quantization: Mapping[str, Any], module: str, label: str) -> tuple[int, int, str]:
    """Bits, group size and mode of a module: its own, or those of all."""
    of_module = quantization.get(module)
    stated = of_module if isinstance(of_module, dict) else quantization
    bits: Any = stated.get("bits")
    group: Any = stated.get("group_size")
    mode = stated.get("mode", quantization.get("mode", "affine"))
    where = f"quantization of '{module}'" if stated is of_module else "quantization"
    message = ""
    if mode != "affine" and mode not in _SCALES:
        message = f"the mode {mode!r} is not read: affine, mxfp4 and nvfp4 are"
    elif bits not in (_BITS if mode == "affine" else (4,)):
        message = f"codes of {bits!r} bits are not read in the mode {mode}"
    elif type(group) is not int or group < 1:
        message = f"a group_size of {group!r}, which is no number of columns"
    if message:
        raise SourceError(f"{where}: {message}", model=label, file="config.json")
    return int(bits), int(group), str(mode)
