"""MXFP4 as gpt-oss is published in it: experts of E2M1 codes, 32 of which share an exponent.

`NAME_blocks` (U8 [experts, columns, groups, 16]) and `NAME_scales` (U8 [experts, columns, groups])
are the stack of matrices `NAME` [experts, 32 * groups, columns], as transformers computes with it:
what is stored is transposed. Gate and up, of which `gate_up_proj` is made in turns, stay so.

Microscaling Formats (MX) Specification 1.0, Open Compute Project; arXiv:2310.10537.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from merge_cli.checkpoint.config import text_config
from merge_cli.checkpoint.headers import TensorRef
from merge_cli.checkpoint.tensors import Read, Tensor
from merge_cli.formats.encoding import Encoding, Part, Tiles
from merge_cli.formats.fp4_encoding import MX_GROUP, MxEncoding, group_magnitudes, mx_exponents
from merge_cli.formats.packed import PackedTensor
from merge_cli.formats.small_floats import numbers_of
from merge_cli.formats.storage_format import (
    DecodedModel,
    quant_method,
    unquantised,
    usual_dtype,
)
from merge_cli.formats.stored_matrix import StoredMatrix, opening
from merge_cli.formats.stored_parts import corrupt, of_shape, reject_leftovers, required
from merge_cli.kernels.quantise import encode_e2m1
from merge_cli.kernels.turned import turned_fp4

_BLOCKS, _SCALES = "_blocks", "_scales"
_EXPONENTS = ("U8", "F8_E8M0")
_TURNED = ("gpt_oss",)  # the only kind of model that has experts like this


class Mxfp4:
    """The format. See `StorageFormat`."""

    name = "MXFP4"

    def detect(self, tensors: Mapping[str, TensorRef], config: Mapping[str, Any]) -> bool:
        return quant_method(config) == "mxfp4" and any(
            name.endswith((_BLOCKS, _SCALES)) for name in tensors
        )

    def encoding(self, word: str, dtype: str, config: Mapping[str, Any]) -> Encoding | None:
        if word != "mxfp4":
            return None
        turned = text_config(config).get("model_type") in _TURNED
        return TransposedMxEncoding() if turned else MxEncoding()

    def decode(
        self, tensors: Mapping[str, TensorRef], config: Mapping[str, Any], label: str
    ) -> DecodedModel:
        default_dtype, opened = usual_dtype(config), opening()
        as_numbers: dict[str, Tensor] = dict(tensors)
        stacks = [ref for ref in tensors.values() if ref.name.endswith(_BLOCKS)]
        for blocks in stacks:
            name = blocks.name.removesuffix(_BLOCKS)
            scales = required(tensors, name + _SCALES, blocks)
            if len(blocks.shape) != 4 or blocks.dtype != "U8" or blocks.shape[-1] != MX_GROUP // 2:
                message = f"{blocks.dtype} of shape {list(blocks.shape)}: experts in MXFP4 are U8"
                raise corrupt(f"{message} of [experts, columns, groups, 16]", blocks)
            if name in tensors:
                raise corrupt(f"is stored a second time, as '{name}'", blocks)
            of_shape(scales, _EXPONENTS, blocks.shape[:-1], why=f"'{blocks.name}'")
            del as_numbers[blocks.name], as_numbers[scales.name]
            experts, columns, groups, _ = blocks.shape
            shape = (experts, groups * MX_GROUP, columns)
            stack = TransposedMxfp4(name, blocks, shape, default_dtype, scales, opened)
            as_numbers[name] = stack
        reject_leftovers(as_numbers.values(), (_BLOCKS, _SCALES))
        note = f"{len(stacks)} stacks of experts in MXFP4 are read as numbers"
        return DecodedModel(as_numbers, unquantised(config), (note,))


MXFP4 = Mxfp4()


@dataclass(frozen=True)
class TransposedMxfp4(PackedTensor):
    """A stack of experts: E2M1 numbers times powers of two, which float32 holds exactly."""

    scales: TensorRef
    opened: int = field(default=0, compare=False, repr=False)

    @property
    def stored(self) -> tuple[TensorRef, ...]:
        return (self.codes, self.scales)

    @property
    def formula(self) -> str:
        return f"MXFP4, transposed, groups of {MX_GROUP}"

    @property
    def encoding(self) -> Encoding:
        return TransposedMxEncoding(self.scales.dtype)

    def fill(self, read: Read, start: int, buffer: memoryview) -> None:
        import numpy as np

        out = np.frombuffer(buffer, np.float32)
        height, width = self.shape[-2:]
        size = height * width
        done = 0
        while done < len(out):
            matrix, inside = divmod(start + done, size)
            count = min(len(out) - done, size - inside)
            self._fill_part(read, matrix, inside, out[done : done + count])
            done += count

    def _fill_part(self, read: Read, matrix: int, start: int, out: Any) -> None:
        """Numbers of one expert from `start` on; its rows are columns of what is stored."""
        height, width = self.shape[-2:]
        codes, scales = (
            StoredMatrix(role, ref, matrix * width * line, width, line, self.opened)
            for role, ref, line in (
                ("codes", self.codes, height // 2),
                ("scales", self.scales, height // MX_GROUP),
            )
        )
        first, last = start // width, -(-(start + len(out)) // width)
        raw = codes.columns(read, first // 2, -(-last // 2))
        exponents = scales.columns(read, first // MX_GROUP, -(-last // MX_GROUP))
        turned_fp4(raw, exponents, MX_GROUP, first, last - first, start - first * width, out)


@dataclass(frozen=True)
class TransposedMxEncoding(Encoding):
    """A stack of experts, each transposed. The scale is that of `MxEncoding`.

    Values come by rows and are stored by columns, so the bytes of a matrix are kept until all of
    its rows have come: an eighth of what its float32 would take.

    Attributes:
        dtype: of the exponents: U8 or F8_E8M0.
    """

    dtype: str = "U8"

    @property
    def family(self) -> str:
        return "mxfp4"

    @property
    def label(self) -> str:
        return "MXFP4"

    @property
    def described(self) -> str:
        return f"an exponent for each {MX_GROUP} inputs of an expert"

    @property
    def only_stacks(self) -> bool:
        return True

    def unfit(self, shape: tuple[int, ...]) -> str:
        if len(shape) != 3:
            return "only stacks of experts are written in it"
        if shape[-2] % MX_GROUP:
            return f"{shape[-2]} inputs are no multiple of the group of {MX_GROUP}"
        return ""

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        experts, rows, columns = shape
        groups = rows // MX_GROUP
        grid, count = (experts, columns, groups), columns * groups
        half = MX_GROUP // 2
        return (
            Part(_BLOCKS, "U8", (*grid, half), rows * columns, count * half),
            Part(_SCALES, self.dtype, grid, rows * columns, count),
        )

    def tile(self, shape: tuple[int, ...]) -> int:
        return MX_GROUP * shape[-1]

    def span(self, shape: tuple[int, ...]) -> int:
        return shape[-2] * shape[-1]

    def encode(self, tiles: Tiles, stored: Sequence[Any]) -> None:
        import numpy as np

        _, rows, columns = tiles.shape
        values, before = tiles.values, tiles.before
        codes = stored[0].reshape(-1, columns, rows // MX_GROUP, MX_GROUP // 2)
        exponents = stored[1].reshape(-1, columns, rows // MX_GROUP)
        size = self.tile(tiles.shape)
        for begin in range(0, len(values), size):
            expert, group = divmod((tiles.at + begin) // size, rows // MX_GROUP)
            lines = values[begin : begin + size].reshape(MX_GROUP, columns)
            changed: Any = slice(None)
            if before is not None:
                old = before[begin : begin + size].reshape(MX_GROUP, columns)
                changed = np.flatnonzero((lines != old).any(axis=0))
            groups = np.ascontiguousarray(lines.T[changed])
            raw = mx_exponents(group_magnitudes(groups))
            packed = np.empty((len(groups), MX_GROUP // 2), np.uint8)
            encode_e2m1(groups, numbers_of("F8_E8M0")[raw], packed)
            codes[expert, changed, group] = packed
            exponents[expert, changed, group] = raw

    def settings(
        self, groups: Mapping[Encoding, Sequence[str]], unconverted: Sequence[str]
    ) -> dict[str, Any]:
        return {"modules_to_not_convert": list(unconverted), "quant_method": "mxfp4"}
