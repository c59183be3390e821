"""A matrix of zeros, which is read from nowhere: no change."""

from __future__ import annotations

from dataclasses import dataclass

from merge_cli.checkpoint.header import TensorRef
from merge_cli.checkpoint.tensors import Read


@dataclass(frozen=True)
class Zeros:
    """No change. See `tensors.Tensor`."""

    name: str
    model: str
    shape: tuple[int, ...]

    @property
    def dtype(self) -> str:
        return "F32"

    @property
    def native(self) -> str:
        return "F32"

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def nbytes(self) -> int:
        return 4 * self.size

    @property
    def stored(self) -> tuple[TensorRef, ...]:
        return ()

    @property
    def formula(self) -> str:
        return "zeros"

    def fill(self, read: Read, start: int, buffer: memoryview) -> None:
        buffer[:] = bytes(len(buffer))
