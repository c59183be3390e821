"""Tensors that are slices or joins of others, without changing a byte.

    TensorPart      one expert, cut from a stack
    JoinedTensor    a stack of experts that are stored one by one

Numbers are computed only where the parts have several dtypes.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from merge_cli.checkpoint.dtypes import width_of
from merge_cli.checkpoint.headers import TensorRef
from merge_cli.checkpoint.tensors import Read, Tensor, read_numbers


def cut(tensor: Tensor, name: str, start: int, shape: tuple[int, ...]) -> Tensor:
    """The elements from `start` on, as a tensor of a shape; a stored tensor's are stored, too."""
    part = TensorPart(tensor, name, start, shape)
    if not isinstance(tensor, TensorRef):
        return part
    width = width_of(tensor.dtype)
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
    def default_dtype(self) -> str:
        return self.whole.default_dtype

    @cached_property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * width_of(self.dtype)

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
    def default_dtype(self) -> str:
        return self.parts[0].default_dtype

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(part.size for part in self.parts))

    @property
    def size(self) -> int:
        return self._ends[-1]

    @property
    def nbytes(self) -> int:
        return self.size * width_of(self.dtype)

    @cached_property
    def stored(self) -> tuple[TensorRef, ...]:
        return tuple(ref for part in self.parts for ref in part.stored)

    @property
    def formula(self) -> str:
        made = "".join(f"; {part.formula}" for part in self.parts if part.formula)
        return f"{len(self.parts)} tensors joined to {self.shape}{made}"

    def fill(self, read: Read, start: int, buffer: memoryview) -> None:
        width, kind = width_of(self.dtype), self.dtype
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
