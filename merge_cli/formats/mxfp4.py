"""MXFP4 as gpt-oss is published in it: experts of E2M1 codes, 32 of which share an exponent.

`NAME_blocks` (U8 [experts, columns, groups, 16]) and `NAME_scales` (U8 [experts, columns, groups])
are the stack of matrices `NAME` [experts, 32 * groups, columns], as transformers computes with it:
what is stored is transposed. Gate and up, of which `gate_up_proj` is made in turns, stay so.

Microscaling Formats (MX) Specification 1.0, Open Compute Project; arXiv:2310.10537.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from merge_cli.checkpoint.headers import TensorRef
from merge_cli.checkpoint.tensors import Read, Tensor
from merge_cli.formats.packed import (
    PackedRows,
    StoredMatrix,
    corrupt,
    of_shape,
    opening,
    reject_leftovers,
    required,
)
from merge_cli.formats.small_floats import numbers_of
from merge_cli.formats.storage_format import (
    DecodedModel,
    quant_method,
    unquantised,
    usual_dtype,
)
from merge_cli.kernels.codes import look_up, spread

_BLOCKS, _SCALES = "_blocks", "_scales"
_GROUP = 32  # numbers that share an exponent
_EXPONENTS = ("U8", "F8_E8M0")


class Mxfp4:
    """The format. See `StorageFormat`."""

    name = "MXFP4"

    def detect(self, tensors: Mapping[str, TensorRef], config: Mapping[str, Any]) -> bool:
        return quant_method(config) == "mxfp4" and any(
            name.endswith((_BLOCKS, _SCALES)) for name in tensors
        )

    def decode(
        self, tensors: Mapping[str, TensorRef], config: Mapping[str, Any], label: str
    ) -> DecodedModel:
        default_dtype, opened = usual_dtype(config), opening()
        as_numbers: dict[str, Tensor] = dict(tensors)
        stacks = [ref for ref in tensors.values() if ref.name.endswith(_BLOCKS)]
        for blocks in stacks:
            name = blocks.name.removesuffix(_BLOCKS)
            scales = required(tensors, name + _SCALES, blocks)
            if len(blocks.shape) != 4 or blocks.dtype != "U8" or blocks.shape[-1] != _GROUP // 2:
                message = f"{blocks.dtype} of shape {list(blocks.shape)}: experts in MXFP4 are U8"
                raise corrupt(f"{message} of [experts, columns, groups, 16]", blocks)
            if name in tensors:
                raise corrupt(f"is stored a second time, as '{name}'", blocks)
            of_shape(scales, _EXPONENTS, blocks.shape[:-1], why=f"'{blocks.name}'")
            del as_numbers[blocks.name], as_numbers[scales.name]
            experts, columns, groups, _ = blocks.shape
            shape = (experts, groups * _GROUP, columns)
            stack = TransposedMxfp4(name, blocks, shape, default_dtype, scales, opened)
            as_numbers[name] = stack
        reject_leftovers(as_numbers.values(), (_BLOCKS, _SCALES))
        note = f"{len(stacks)} stacks of experts in MXFP4 are read as numbers"
        return DecodedModel(as_numbers, unquantised(config), (note,))


MXFP4 = Mxfp4()


@dataclass(frozen=True)
class TransposedMxfp4(PackedRows):
    """A stack of experts: E2M1 numbers times powers of two, which float32 holds exactly."""

    scales: TensorRef
    opened: int = field(default=0, compare=False, repr=False)

    @property
    def stored(self) -> tuple[TensorRef, ...]:
        return (self.codes, self.scales)

    @property
    def formula(self) -> str:
        return f"MXFP4, transposed, groups of {_GROUP}"

    def rows(self, read: Read, first: int, last: int) -> Any:
        import numpy as np

        out = np.empty((last - first, self.shape[-1]), np.float32)
        row = 0
        for matrix, low, high in self.by_matrix(first, last):
            self._fill_rows(read, matrix, low, high, out[row : row + high - low])
            row += high - low
        return out

    def _fill_rows(self, read: Read, matrix: int, first: int, last: int, out: Any) -> None:
        """Rows [first, last) of one expert, which are columns of what is stored."""
        import numpy as np

        height, width = self.shape[-2:]
        codes, scales = (
            StoredMatrix(role, ref, matrix * width * line, width, line, self.opened)
            for role, ref, line in (
                ("codes", self.codes, height // 2),
                ("scales", self.scales, height // _GROUP),
            )
        )
        raw = codes.columns(read, first // 2, -(-last // 2))
        # Bytes are turned, and not the numbers, which are eight times as many bytes.
        turned = spread(np.ascontiguousarray(raw.T), 4, raw.shape[0])
        begin = first % 2
        codes_by_row = turned.reshape(-1, raw.shape[0])[begin : begin + last - first]
        out[:] = look_up(numbers_of("F4_E2M1"), codes_by_row)
        groups = range(first // _GROUP, -(-last // _GROUP))
        exponents = scales.columns(read, groups.start, groups.stop)
        powers = numbers_of("F8_E8M0")[exponents.T]
        for group, power in zip(groups, powers, strict=True):
            low, high = max(first, group * _GROUP), min(last, (group + 1) * _GROUP)
            out[low - first : high - first] *= power
