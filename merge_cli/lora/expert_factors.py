"""Weights with LoRA updates of single experts: blocks of a stack of matrices, or of one matrix.

PEFT keeps the factors of all experts of a parameter in two matrices: A [experts * rank, inputs],
expert by expert, and B [outputs, rank * experts], in whose columns the expert changes fastest
(`target_parameters`). A `MatrixView` is one expert's factor in such a matrix, or a whole factor.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from merge_cli.checkpoint.headers import TensorRef
from merge_cli.checkpoint.tensors import Float32, Read, Tensor, read_numbers
from merge_cli.kernels.matrices import low_rank_product

_ROOM = 2**28  # bytes of factors that stay in memory: the experts of one layer share theirs


@dataclass(frozen=True)
class MatrixView:
    """A matrix inside a stored one: element (i, j) is number `start + i * down + j * right`."""

    stored: TensorRef
    rows: int
    columns: int
    start: int
    down: int
    right: int

    @classmethod
    def whole(cls, ref: TensorRef) -> MatrixView:
        """A stored matrix itself."""
        return cls(ref, ref.shape[0], ref.shape[1], 0, ref.shape[1], 1)

    @property
    def turned(self) -> MatrixView:
        """The transposed matrix."""
        return MatrixView(self.stored, self.columns, self.rows, self.start, self.right, self.down)

    def cut_rows(self, first: int, count: int) -> MatrixView:
        """`count` rows from `first` on."""
        begin = self.start + first * self.down
        return MatrixView(self.stored, count, self.columns, begin, self.down, self.right)

    def read(self, read: Read, stamp: str, first: int = 0, count: int | None = None) -> Any:
        """Rows [first, first + count): numpy float32.

        Args:
            stamp: of the file, so that another one at its place is not taken for it.
        """
        import numpy as np

        flat = _numbers(read, self.stored, stamp)
        count = self.rows - first if count is None else count
        result = np.lib.stride_tricks.as_strided(
            flat[self.start + first * self.down :],
            (count, self.columns),
            (self.down * flat.itemsize, self.right * flat.itemsize),
            writeable=False,
        )
        return np.array(result, order="C")  # of its own: compiled kernels write beside it


@dataclass(frozen=True)
class MatrixUpdate:
    """A product that is added to a block of an expert's matrix: scale * left @ right.

    Attributes:
        expert: the matrix's number in the stack.
        row, column: where the block begins.
    """

    left: MatrixView
    right: MatrixView
    scale: float
    expert: int = 0
    row: int = 0
    column: int = 0

    @property
    def formula(self) -> str:
        views = [(v.stored.name, v.start, v.down, v.right) for v in (self.left, self.right)]
        return f"{views} {self.scale!r} {self.expert} {self.row} {self.column}"


@dataclass(frozen=True)
class PatchedTensor(Float32):
    """`weight`, a matrix or a stack of matrices, with its patches. See `tensors.Tensor`."""

    weight: Tensor
    patches: tuple[MatrixUpdate, ...] = field(repr=False)
    stamp: str = ""

    @property
    def made_of(self) -> Tensor:
        return self.weight

    @property
    def native(self) -> str:
        return self.weight.native

    @property
    def stored(self) -> tuple[TensorRef, ...]:
        factors = {view.stored: None for p in self.patches for view in (p.left, p.right)}
        return (*self.weight.stored, *factors)

    @property
    def formula(self) -> str:
        updates = "; ".join(patch.formula for patch in self.patches)
        return f"{self.weight.formula}; updates of experts: {updates}; {self.stamp}"

    @property
    def rank(self) -> int:
        """Of a matrix that one patch covers."""
        return self.patches[0].left.columns

    @property
    def scale(self) -> float:
        """Of a matrix that one patch covers."""
        return self.patches[0].scale

    def factors(self, read: Read) -> tuple[Any, Any]:
        """The product of a matrix that one patch covers, its scale aside."""
        (patch,) = self.patches
        return patch.left.read(read, self.stamp), patch.right.read(read, self.stamp)

    def fill(self, read: Read, start: int, buffer: memoryview) -> None:
        """Whole rows are computed, of which the buffer gets its part."""
        import numpy as np

        count = len(buffer) // 4
        height, width = self.shape[-2:]
        first, last = start // width, -(-(start + count) // width)
        rows = read_numbers(read, self.weight, first * width, (last - first) * width)
        rows = rows.reshape(last - first, width)
        for patch in self.patches:
            begin = patch.expert * height + patch.row
            low, high = max(first, begin), min(last, begin + patch.left.rows)
            if low >= high:
                continue
            left = patch.left.read(read, self.stamp, low - begin, high - low)
            update = low_rank_product(left, patch.right.read(read, self.stamp))
            columns = slice(patch.column, patch.column + patch.right.columns)
            rows[low - first : high - first, columns] += np.float32(patch.scale) * update
        out = np.frombuffer(buffer, np.float32)
        begin = start - first * width
        out[:] = rows.reshape(-1)[begin : begin + count]


def _numbers(read: Read, ref: TensorRef, stamp: str) -> Any:
    """A stored tensor's numbers, flat; the latest ones are kept."""
    key = (ref, stamp)
    with _lock:
        cached = _recent.get(key)
        if cached is not None:
            _recent.move_to_end(key)
            return cached
    numbers = read_numbers(read, ref, 0, ref.size)
    with _lock:
        _recent[key] = numbers
        while len(_recent) > 2 and sum(item.nbytes for item in _recent.values()) > _ROOM:
            _recent.popitem(last=False)
    return numbers


_recent: OrderedDict[tuple[TensorRef, str], Any] = OrderedDict()
_lock = threading.Lock()
