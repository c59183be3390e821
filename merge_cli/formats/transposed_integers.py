"""Integers that are stored [in, out] with scales and zero points by groups of inputs: GPTQ, AWQ.

A row of the weight is a column of what is stored, which is read by strips (`StoredMatrix`). Which
bits a code lies in is the format's own; scale times (code - zero point) is both formats'.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from merge_cli.checkpoint.headers import TensorRef
from merge_cli.checkpoint.tensors import Read
from merge_cli.errors import SourceError
from merge_cli.formats.grouped_integers import apply_groups, read_order
from merge_cli.formats.packed import PackedRows
from merge_cli.formats.stored_matrix import StoredMatrix
from merge_cli.formats.stored_parts import corrupt, required

FLOATS = ("F16", "BF16", "F32")
CODES = ".qweight"
ENDINGS = (CODES, ".qzeros", ".scales", ".g_idx")


@dataclass(frozen=True)
class TransposedIntegers(PackedRows):
    """A matrix [out, in]. See the module.

    Attributes:
        bits: of a code.
        scales: [groups, out].
        zeros: packed, [groups, out * bits / 32].
        order: the group of each input; None where `group` of them follow one another.
        group: inputs of a group.
    """

    bits: int
    scales: TensorRef
    zeros: TensorRef
    order: TensorRef | None
    group: int
    opened: int = field(default=0, compare=False, repr=False)

    @property
    def stored(self) -> tuple[TensorRef, ...]:
        extra = (self.order,) if self.order is not None else ()
        return (self.codes, self.scales, self.zeros, *extra)

    @property
    def groups(self) -> int:
        return self.scales.shape[0]

    @abstractmethod
    def code_rows(self, read: Read, first: int, last: int) -> Any:
        """Codes of rows [first, last): numpy float32 [rows, in], to be changed."""

    @abstractmethod
    def zero_rows(self, read: Read, first: int, last: int) -> Any:
        """Zero points of rows [first, last): numpy float32 [rows, groups]."""

    @property
    def fits_words(self) -> bool:
        """Whether no code lies in two words: then `turn` can be used."""
        return 32 % self.bits == 0

    @abstractmethod
    def turn(
        self, read: Read, first: int, last: int, zeros: Any, scales: Any, begin: int, out: Any
    ) -> None:
        """Fill numbers of rows [first, last), from the one at `begin` on, in one loop.

        Args:
            zeros, scales: numpy float32 [rows, groups], of groups that follow one another.
            out: numpy float32, flat.
        """

    def fill(self, read: Read, start: int, buffer: memoryview) -> None:
        import numpy as np

        if not self.fits_words or self._order(read) is not None:
            super().fill(read, start, buffer)
            return
        out, width = np.frombuffer(buffer, np.float32), self.shape[-1]
        first, last = start // width, -(-(start + len(out)) // width)
        zeros = np.ascontiguousarray(self.zero_rows(read, first, last))
        scales = self._scale_rows(read, first, last)
        self.turn(read, first, last, zeros, scales, start - first * width, out)

    def rows(self, read: Read, first: int, last: int) -> Any:
        import numpy as np

        numbers, zeros = self.code_rows(read, first, last), self.zero_rows(read, first, last)
        order = self._order(read)
        if order is None and self.shape[-1] != self.groups * self.group:
            order = np.arange(self.shape[-1]) // self.group
        return apply_groups(numbers, self._scale_rows(read, first, last), zeros, order)

    def _scale_rows(self, read: Read, first: int, last: int) -> Any:
        """Scales of rows [first, last): numpy float32 [rows, groups]."""
        import numpy as np

        stored = self.matrix("scales", self.scales).columns(read, first, last)
        return np.ascontiguousarray(_floats(stored, self.scales.dtype).T)

    def matrix(self, role: str, ref: TensorRef) -> StoredMatrix:
        """A stored matrix, to be read by columns."""
        return StoredMatrix(role, ref, 0, ref.shape[0], ref.shape[1], self.opened)

    def _order(self, read: Read) -> Any:
        """The group of each input; None where groups of one size follow one another."""
        import numpy as np

        if self.order is None:
            return None
        order = read_order(read, self.order, self.groups)
        return None if np.array_equal(order, np.arange(self.shape[-1]) // self.group) else order


def _floats(raw: Any, dtype: str) -> Any:
    """Stored bits as float32: numpy unsigned integers of the dtype's width."""
    import numpy as np

    if dtype == "BF16":
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.view({"F16": np.float16, "F32": np.float32}[dtype]).astype(np.float32)


def scales_and_zeros(
    codes: TensorRef, tensors: Mapping[str, TensorRef], name: str
) -> tuple[TensorRef, TensorRef]:
    """What a module's codes are scaled with, both matrices.

    Args:
        name: of the format, for messages.

    Raises:
        CorruptFileError: one is not there, or what is there are no matrices.
    """
    module = codes.name.removesuffix(CODES)
    scales = required(tensors, f"{module}.scales", codes)
    zeros = required(tensors, f"{module}.qzeros", codes)
    if codes.dtype != "I32" or len(codes.shape) != 2 or not codes.size:
        message = f"{codes.dtype} of shape {list(codes.shape)}: {name} has I32 matrices"
        raise corrupt(message, codes)
    if len(scales.shape) != 2 or not scales.size:
        raise corrupt(f"scales of shape {list(scales.shape)}: {name} has matrices", scales)
    return scales, zeros


def group_size(quantization: Mapping[str, Any], label: str) -> int:
    """Inputs of a group as the config says; -1 where all are one group.

    Raises:
        SourceError: it says none.
    """
    size = quantization.get("group_size", quantization.get("q_group_size"))
    if type(size) is not int or (size < 1 and size != -1):
        message = f"a group_size of {size!r}, which is no number of inputs"
        raise SourceError(message, model=label, file="config.json")
    return size


def group_of(scales: TensorRef, inputs: int, size: int, *, fixed: bool) -> int:
    """Inputs of a weight's groups.

    Args:
        size: what the config says; -1 for all.
        fixed: the config says nothing about single modules.

    Raises:
        CorruptFileError: as many scales as no groups are.
    """
    groups = scales.shape[0]
    declared = inputs if size == -1 else size
    if -(-inputs // declared) == groups:
        return declared
    if not fixed and groups and inputs % groups == 0:
        return inputs // groups
    message = f"{groups} groups of {inputs} inputs do not follow from a group_size of {size}"
    raise corrupt(message, scales)
