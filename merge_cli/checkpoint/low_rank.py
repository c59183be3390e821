"""A weight with its LoRA update, computed while it is read: W + s B A, and DoRA's rescaled rows.

LoRA: Hu et al., arXiv:2106.09685; DoRA: Liu et al., arXiv:2402.09353. Equal to what PEFT's
`merge_and_unload` makes, in float32 and rounded only where the merge's output is.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from merge_cli.checkpoint.header import TensorRef
from merge_cli.checkpoint.stored import read_numbers
from merge_cli.checkpoint.tensors import Float32, Read, Tensor
from merge_cli.kernels.low_rank import low_rank_product

_KEPT = 16  # updates whose smaller factor stays in memory: blocks of one weight follow each other


@dataclass(frozen=True)
class UpdatedTensor(Float32):
    """`weight` with an update. See `tensors.Tensor`.

    Attributes:
        left, right: factors of the update, stored [rows, rank] and [rank, columns]; or, with
            `turned`, [rank, rows] and [columns, rank]: of embeddings, and layers stored [in, out].
        scale: of their product.
        magnitude: DoRA's length of each row; None without.
        stamp: of the adapter's file, so that another one at its place is not taken for it.
    """

    weight: Tensor
    left: TensorRef
    right: TensorRef
    scale: float
    turned: bool = False
    magnitude: TensorRef | None = None
    stamp: str = ""

    @property
    def made_of(self) -> Tensor:
        return self.weight

    @property
    def native(self) -> str:
        return self.weight.native

    @property
    def stored(self) -> tuple[TensorRef, ...]:
        extra = (self.magnitude,) if self.magnitude else ()
        return (*self.weight.stored, self.left, self.right, *extra)

    @property
    def formula(self) -> str:
        update = f"low-rank update, scale {self.scale!r}, turned {self.turned}, {self.stamp}"
        return f"{self.weight.formula}; {update}"

    @property
    def rank(self) -> int:
        return self.left.shape[0 if self.turned else 1]

    def factors(self, read: Read) -> tuple[Any, Any]:
        """The update as a product, its scale aside: numpy float32 [rows, rank], [rank, columns]."""
        return self._left(read, 0, self.shape[0]), self._right(read)

    def fill(self, read: Read, start: int, buffer: memoryview) -> None:
        """Whole rows are computed, of which the buffer gets its part."""
        import numpy as np

        count = len(buffer) // 4
        columns = self.shape[1]
        first, last = start // columns, -(-(start + count) // columns)
        rows = read_numbers(read, self.weight, first * columns, (last - first) * columns)
        rows = rows.reshape(last - first, columns)
        update = low_rank_product(self._left(read, first, last), self._right(read))
        rows += np.float32(self.scale) * update
        if self.magnitude is not None:
            wanted = read_numbers(read, self.magnitude, first, last - first)
            # The length of each row by itself, in float64: it depends on no other row.
            lengths = np.sqrt((rows.astype(np.float64) ** 2).sum(1))
            rows *= (wanted / lengths).astype(np.float32)[:, None]
        out = np.frombuffer(buffer, np.float32)
        begin = start - first * columns
        out[:] = rows.reshape(-1)[begin : begin + count]

    def _left(self, read: Read, first: int, last: int) -> Any:
        """Rows [first, last) of the left factor."""
        import numpy as np

        if not self.turned:
            rank = self.left.shape[1]
            found = read_numbers(read, self.left, first * rank, (last - first) * rank)
            return found.reshape(last - first, rank)
        rank, rows = self.left.shape
        parts = [read_numbers(read, self.left, k * rows + first, last - first) for k in range(rank)]
        return np.stack(parts, axis=1)

    def _right(self, read: Read) -> Any:
        """The right factor, whole."""
        import numpy as np

        with _lock:
            known = _recent.get(self)
            if known is not None:
                _recent.move_to_end(self)
                return known
        found = read_numbers(read, self.right, 0, self.right.size).reshape(self.right.shape)
        found = np.ascontiguousarray(found.T) if self.turned else found
        with _lock:
            _recent[self] = found
            while len(_recent) > _KEPT:
                _recent.popitem(last=False)
        return found


@dataclass(frozen=True)
class ShiftedTensor(Float32):
    """`bias` plus `scale` times the bias of a factor (PEFT's lora_bias). See `tensors.Tensor`."""

    bias: Tensor
    change: TensorRef
    scale: float
    stamp: str

    @property
    def made_of(self) -> Tensor:
        return self.bias

    @property
    def native(self) -> str:
        return self.bias.native

    @property
    def stored(self) -> tuple[TensorRef, ...]:
        return (*self.bias.stored, self.change)

    @property
    def formula(self) -> str:
        return f"{self.bias.formula}; shifted, scale {self.scale!r}, {self.stamp}"

    def fill(self, read: Read, start: int, buffer: memoryview) -> None:
        import numpy as np

        out = np.frombuffer(buffer, np.float32)
        change = read_numbers(read, self.change, start, len(out))
        out[:] = read_numbers(read, self.bias, start, len(out)) + np.float32(self.scale) * change


_recent: OrderedDict[UpdatedTensor, Any] = OrderedDict()
_lock = threading.Lock()
