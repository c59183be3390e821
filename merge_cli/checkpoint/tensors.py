"""What a merge reads: a tensor as it is stored, or one that is computed from stored ones.

Methods and lanes cannot tell which. A computed tensor (a weight with its adapter, dequantised,
with its rows in another order) says what it is made of and fills a buffer with any span of its
elements; it is never materialised. What it fills in must not depend on where the span begins.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from merge_cli.checkpoint.header import TensorRef

# read(ref, start, buffer): what is stored from element `start` on, as much as fits the buffer.
Read = Callable[[TensorRef, int, memoryview], None]


class Tensor(Protocol):
    """`TensorRef`, or a frozen, hashable description of a computed tensor.

    Attributes:
        name: as the model calls it.
        model: the source's label, for messages.
        dtype: safetensors dtype of what `fill` fills in.
        native: dtype that the output has where the recipe names none.
        stored: every stored tensor that it is computed from; the most telling one first.
        formula: how, with every number that decides it (or a digest): another formula makes another
            merge. Empty for what is stored.
    """

    @property
    def name(self) -> str: ...
    @property
    def model(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def native(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def size(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def stored(self) -> tuple[TensorRef, ...]: ...
    @property
    def formula(self) -> str: ...

    def fill(self, read: Read, start: int, buffer: memoryview) -> None:
        """Fill a buffer of bytes with the elements from `start` on, in row-major order."""


class Float32:
    """What a tensor that is computed in float32 has from the one that it is made of."""

    @property
    def made_of(self) -> Tensor:
        raise NotImplementedError

    @property
    def name(self) -> str:
        return self.made_of.name

    @property
    def model(self) -> str:
        return self.made_of.model

    @property
    def dtype(self) -> str:
        return "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.made_of.shape

    @property
    def size(self) -> int:
        return self.made_of.size

    @property
    def nbytes(self) -> int:
        return 4 * self.size
