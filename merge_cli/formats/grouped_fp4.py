"""Numbers of four bits (E2M1) with a scale for each group of columns, and one for the tensor.

    NVFP4   E4M3 scales of 16 columns, times (ModelOpt) or over (compressed-tensors) a float32
    MXFP4   exponents (E8M0) of 32 columns

How they are written is in formats/fp4_encoding.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from merge_cli.checkpoint.headers import TensorRef
from merge_cli.checkpoint.tensors import Read
from merge_cli.formats.encoding import Encoding
from merge_cli.formats.fp4_encoding import (
    GROUP,
    CompressedNvfp4Encoding,
    ModelOptEncoding,
    MxEncoding,
)
from merge_cli.formats.packed import PackedRows
from merge_cli.formats.small_floats import fp4_numbers, read_scales
from merge_cli.formats.stored_parts import corrupt, of_shape
from merge_cli.kernels.codes import scale_groups


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

    @property
    def encoding(self) -> Encoding | str:
        group = self.shape[-1] // self.scales.shape[-1]
        if len(self.shape) != 2:
            return "stacks in E2M1 are not written: matrices are"
        if self.second is None:
            return MxEncoding(self.scales.dtype)
        if self.second.dtype != "F32" or group != GROUP:
            return f"E2M1 with a scale in {self.second.dtype} for the tensor is not written"
        kind = CompressedNvfp4Encoding if self.divides else ModelOptEncoding
        return kind(self.second.shape)

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
