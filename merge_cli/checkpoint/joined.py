"""Tensors cut from others, and put together of others, as they follow each other in memory.

What experts are that one model stores one by one and another stacked. Bytes are not changed.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from merge_cli.checkpoint.header import DTYPES, TensorRef
from merge_cli.checkpoint.stored import read_numbers
from merge_cli.checkpoint.tensors import Read, Tensor


def cut(tensor: Tensor, name: str, start: int, shape: tuple[int, ...]) -> Tensor:
    """The elements from `start` on, as a tensor of a shape; a stored tensor's are stored, too."""
    part = TensorPart(tensor, name, start, shape)
    if not isinstance(tensor, TensorRef):
        return part
    width = DTYPES[tensor.dtype][0]
    return tensor._replace(
        name=name, shape=shape, offset=tensor.offset + start * width, nbytes=part.nbytes
    )


@dataclass(frozen=True, eq=False)
class TensorPart:
    """Consecutive elements of a computed tensor. See `tensors.Tensor`."""

    whole: Tensor
    name: str
    start: int
    shape: tuple[int, ...]

    @property
    def model(self) -> str:
        return self.whole.model

    @property
    def dtype(self) -> str:
        return self.whole.dtype

    @property
    def native(self) -> str:
        return self.whole.native

    @cached_property
    def size(self) -> int:
        count = 1
        for length in self.shape:
            count *= length
        return count

    @property
    def nbytes(self) -> int:
        return self.size * DTYPES[self.dtype][0]

    @property
    def stored(self) -> tuple[TensorRef, ...]:
        return self.whole.stored

    @property
    def formula(self) -> str:
        return f"{self.size} elements from {self.start} of ({self.whole.formula})"

    def fill(self, read: Read, start: int, buffer: memoryview) -> None:
        self.whole.fill(read, self.start + start, buffer)


@dataclass(frozen=True, eq=False)
class JoinedTensor:
    """Tensors of a model one behind the other. See `tensors.Tensor`.

    Attributes:
        parts: in the order of memory; together they have as many elements as the shape.
    """

    name: str
    shape: tuple[int, ...]
    parts: Sequence[Tensor]

    @property
    def model(self) -> str:
        return self.parts[0].model

    @cached_property
    def dtype(self) -> str:
        formats = {part.dtype for part in self.parts}
        return formats.pop() if len(formats) == 1 else "F64" if "F64" in formats else "F32"

    @property
    def native(self) -> str:
        return self.parts[0].native

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(part.size for part in self.parts))

    @property
    def size(self) -> int:
        return self._ends[-1]

    @property
    def nbytes(self) -> int:
        return self.size * DTYPES[self.dtype][0]

    @cached_property
    def stored(self) -> tuple[TensorRef, ...]:
        return tuple(ref for part in self.parts for ref in part.stored)

    @property
    def formula(self) -> str:
        made = "".join(f"; {part.formula}" for part in self.parts if part.formula)
        return f"{len(self.parts)} tensors joined to {self.shape}{made}"

    def fill(self, read: Read, start: int, buffer: memoryview) -> None:
        width, kind = DTYPES[self.dtype][0], self.dtype
        filled, raw = 0, buffer.cast("B")
        number = bisect_right(self._ends, start)
        while filled < len(raw):
            part = self.parts[number]
            inside = start + filled // width - (self._ends[number] - part.size)
            count = min(part.size - inside, (len(raw) - filled) // width)
            target = raw[filled : filled + count * width]
            if part.dtype == kind:
                part.fill(read, inside, target)
            else:
                _fill_numbers(read, part, inside, target, kind)
            filled += count * width
            number += 1


def _fill_numbers(read: Read, part: Tensor, start: int, target: memoryview, kind: str) -> None:
    import numpy as np

    out = np.frombuffer(target, np.float64 if kind == "F64" else np.float32)
    out[:] = read_numbers(read, part, start, len(out))
