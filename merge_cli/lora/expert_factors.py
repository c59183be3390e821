"""Weights with LoRA updates of single experts: blocks of a stack of matrices, or of one matrix.

PEFT keeps the factors of all experts of a parameter in two matrices: A [experts * rank, inputs],
expert by expert, and B [outputs, rank * experts], in whose columns the expert changes fastest
(`target_parameters`). A `MatrixView` is one expert's factor in such a matrix, or a complete factor.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from merge_cli.checkpoint.headers import TensorRef
from merge_cli.checkpoint.tensors import Float32, Read, Tensor, fill_rows, read_numbers
from merge_cli.kernels.matrices import add_low_rank

_CACHE_BYTES = 2**28  # bytes of factors that stay in memory: the experts of one layer share theirs


@dataclass(frozen=True)
class MatrixView:
    """A matrix inside a stored one: element (i, j) is number
    `start + i * row_stride + j * column_stride`."""

    stored: TensorRef
    rows: int
    columns: int
    start: int
    row_stride: int
    column_stride: int

    @classmethod
    def of_tensor(cls, ref: TensorRef) -> MatrixView:
        """A stored matrix itself."""
        return cls(ref, ref.shape[0], ref.shape[1], 0, ref.shape[1], 1)

    @property
    def transposed(self) -> MatrixView:
        """The transposed matrix."""
        return MatrixView(
            self.stored, self.columns, self.rows, self.start, self.column_stride, self.row_stride
        )

    def slice_rows(self, first: int, count: int) -> MatrixView:
        """`count` rows from `first` on."""
        begin = self.start + first * self.row_stride
        return MatrixView(
            self.stored, count, self.columns, begin, self.row_stride, self.column_stride
        )

    def read(self, read: Read, fingerprint: str, first: int = 0, count: int | None = None) -> Any:
        """Rows [first, first + count): numpy float32.

        Args:
            fingerprint: of the file: another file at the same path has another one.
        """
        import numpy as np

        flat = read_cached(read, self.stored, fingerprint)
        count = self.rows - first if count is None else count
        matrix = np.lib.stride_tricks.as_strided(
            flat[self.start + first * self.row_stride :],
            (count, self.columns),
            (self.row_stride * flat.itemsize, self.column_stride * flat.itemsize),
            writeable=False,
        )
        return np.array(matrix, order="C")  # a contiguous copy: compiled kernels need one


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
        views = [
            (v.stored.name, v.start, v.row_stride, v.column_stride) for v in (self.left, self.right)
        ]
        return f"{views} {self.scale!r} {self.expert} {self.row} {self.column}"


@dataclass(frozen=True)
class PatchedTensor(Float32):
    """`weight`, a matrix or a stack of matrices, with its patches. See `tensors.Tensor`."""

    weight: Tensor
    patches: tuple[MatrixUpdate, ...] = field(repr=False)
    fingerprint: str = ""

    is_update = True

    @property
    def made_of(self) -> Tensor:
        return self.weight

    @property
    def default_dtype(self) -> str:
        return self.weight.default_dtype

    @property
    def stored(self) -> tuple[TensorRef, ...]:
        factors = {view.stored: None for p in self.patches for view in (p.left, p.right)}
        return (*self.weight.stored, *factors)

    @property
    def formula(self) -> str:
        updates = "; ".join(patch.formula for patch in self.patches)
        return f"{self.weight.formula}; updates of experts: {updates}; {self.fingerprint}"

    @property
    def rank(self) -> int:
        """The rank of the one patch that covers the matrix."""
        return self.patches[0].left.columns

    @property
    def scale(self) -> float:
        """The scale of the one patch that covers the matrix."""
        return self.patches[0].scale

    def factors(self, read: Read) -> tuple[Any, Any]:
        """The factors of the one patch that covers the matrix, without its scale."""
        (patch,) = self.patches
        return patch.left.read(read, self.fingerprint), patch.right.read(read, self.fingerprint)

    def fill(self, read: Read, start: int, buffer: memoryview) -> None:
        fill_rows(buffer, start, self.shape[-1], partial(self._rows, read))

    def _rows(self, read: Read, first: int, last: int) -> Any:
        """Rows [first, last) of the matrices one below the other."""
        height, width = self.shape[-2:]
        rows = read_numbers(read, self.weight, first * width, (last - first) * width)
        rows = rows.reshape(last - first, width)
        for patch in self.patches:
            begin = patch.expert * height + patch.row
            low, high = max(first, begin), min(last, begin + patch.left.rows)
            if low >= high:
                continue
            left = patch.left.read(read, self.fingerprint, low - begin, high - low)
            columns = slice(patch.column, patch.column + patch.right.columns)
            covered = rows[low - first : high - first, columns]
            add_low_rank(left, patch.right.read(read, self.fingerprint), patch.scale, covered)
        return rows


def read_cached(read: Read, ref: TensorRef, fingerprint: str) -> Any:
    """A stored tensor's numbers, flat float32; the latest tensors stay in memory."""
    key = (ref, fingerprint)
    with _lock:
        cached = _recent.get(key)
        if cached is not None:
            _recent.move_to_end(key)
            return cached
    numbers = read_numbers(read, ref, 0, ref.size)
    with _lock:
        _recent[key] = numbers
        while len(_recent) > 2 and sum(item.nbytes for item in _recent.values()) > _CACHE_BYTES:
            _recent.popitem(last=False)
    return numbers


_recent: OrderedDict[tuple[TensorRef, str], Any] = OrderedDict()
_lock = threading.Lock()
