"""NVFP4 as ModelOpt writes it: E2M1 codes, an E4M3 scale for 16 of them, and one for the tensor.

`weight` (U8 [rows, columns / 2]), `weight_scale` (E4M3 [rows, columns / 16]), `weight_scale_2`
(float32). compressed-tensors has the same numbers with other names, and the reciprocal of the last
(formats/compressed_tensors.py).

NVIDIA, Pretraining Large Language Models with NVFP4, arXiv:2509.25149, section 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from merge_cli.checkpoint.headers import TensorRef
from merge_cli.checkpoint.tensors import Read, Tensor
from merge_cli.formats.fp8 import FP8_CODES, dequantised
from merge_cli.formats.packed import (
    PackedRows,
    corrupt,
    drop_activations,
    of_shape,
    reject_leftovers,
    required,
)
from merge_cli.formats.small_floats import fp4_numbers, read_scales
from merge_cli.formats.storage_format import (
    DecodedModel,
    quant_method,
    quantization_of,
    unquantised,
    usual_dtype,
)
from merge_cli.kernels.codes import scale_groups

_SECOND = "_scale_2"  # behind the weight's name
_GROUP = 16
_METHODS = ("", "modelopt", "modelopt_fp4", "modelopt_mixed")  # no word: in hf_quant_config.json


class Nvfp4:
    """The format. See `StorageFormat`."""

    name = "NVFP4"

    def detect(self, tensors: Mapping[str, TensorRef], config: Mapping[str, Any]) -> bool:
        return quant_method(config) in _METHODS and any(
            ref.dtype == "U8" and name + _SECOND in tensors for name, ref in tensors.items()
        )

    def decode(
        self, tensors: Mapping[str, TensorRef], config: Mapping[str, Any], label: str
    ) -> DecodedModel:
        default_dtype, quantization = usual_dtype(config), quantization_of(config)
        as_numbers: dict[str, Tensor] = dict(tensors)
        count = 0
        for name, ref in tensors.items():
            if ref.dtype in FP8_CODES and not name.endswith("_scale"):
                weight = dequantised(ref, tensors, quantization, default_dtype, label)
                if weight.scale is not None:
                    del as_numbers[weight.scale.name]
                as_numbers[name] = weight
            if ref.dtype != "U8" or name + _SECOND not in tensors:
                continue
            scales, second = required(tensors, f"{name}_scale", ref), tensors[name + _SECOND]
            as_numbers[name] = fp4_weight(name, ref, scales, default_dtype, _GROUP, second)
            del as_numbers[scales.name], as_numbers[second.name]
            count += 1
        notes = drop_activations(as_numbers)
        reject_leftovers(as_numbers.values(), (_SECOND,))
        notes.insert(0, f"{count} NVFP4 weights are read as numbers")
        return DecodedModel(as_numbers, unquantised(config), tuple(notes))


NVFP4 = Nvfp4()


@dataclass(frozen=True)
class GroupedFp4(PackedRows):
    """E2M1 numbers, the scale of their group, and the scale of the tensor.

    Attributes:
        scales: [..., rows, groups], E4M3 or exponents alone.
        second: a number for all, or for each matrix of a stack; None where there is none.
        divides: the scale of the tensor is the reciprocal.
    """

    scales: TensorRef
    second: TensorRef | None
    divides: bool

    @property
    def stored(self) -> tuple[TensorRef, ...]:
        return (self.codes, self.scales, *([self.second] if self.second else []))

    @property
    def formula(self) -> str:
        return f"E2M1 by {self.scales.shape[-1]} scales, divided {self.divides}"

    def rows(self, read: Read, first: int, last: int) -> Any:
        import numpy as np

        count, columns, groups = last - first, self.shape[-1], self.scales.shape[-1]
        raw = np.empty((count, columns // 2), np.uint8)
        read(self.codes, first * raw.shape[1], raw.reshape(-1).data)
        scales = read_scales(read, self.scales, first * groups, count * groups)
        scales = scales.reshape(count, groups)
        if self.second is not None:
            second = read_scales(read, self.second, 0, self.second.size)
            if len(second) > 1:
                second = second[np.arange(first, last) // self.shape[-2], None]
            scales = scales / second if self.divides else scales * second
        numbers = fp4_numbers(raw)
        scale_groups(numbers, scales)
        return numbers


def fp4_weight(
    name: str,
    codes: TensorRef,
    scales: TensorRef,
    default_dtype: str,
    group: int,
    second: TensorRef | None = None,
    *,
    divides: bool = False,
) -> GroupedFp4:
    """A weight in E2M1, its parts checked against one another.

    Args:
        group: columns that share a scale.

    Raises:
        CorruptFileError: parts that do not fit.
    """
    if codes.dtype != "U8" or len(codes.shape) < 2 or codes.shape[-1] * 2 % group:
        message = f"{codes.dtype} of shape {list(codes.shape)}: numbers of four bits are U8 of"
        raise corrupt(f"{message} [..., rows, columns / 2], in groups of {group} columns", codes)
    shape = (*codes.shape[:-1], codes.shape[-1] * 2)
    dtypes = ("F8_E4M3",) if second else ("U8", "F8_E8M0")
    of_shape(scales, dtypes, (*shape[:-1], shape[-1] // group), why=f"'{codes.name}'")
    if second is not None:
        single = ((), (1,), shape[:-2], (*shape[:-2], 1), (*shape[:-2], 1, 1))
        of_shape(second, ("F32", "F16", "BF16"), *single, why=f"'{codes.name}'")
    return GroupedFp4(name, codes, shape, default_dtype, scales, second, divides)
