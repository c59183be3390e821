"""What a merge reads: a tensor as it is stored, or one that is computed from stored ones.

Methods and workers cannot tell which. A computed tensor (a weight with its adapter, dequantised,
with its rows in another order) says what it is made of and fills a buffer with any span of its
elements; it is never held in memory whole. What it fills in must not depend on where the span
begins, since chunks, blocks and threads begin anywhere.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Protocol, runtime_checkable

from merge_cli.checkpoint.dtypes import numpy_dtype, width_of
from merge_cli.checkpoint.header_columns import HeaderColumns
from merge_cli.checkpoint.headers import TensorRef
from merge_cli.checkpoint.stored_tensors import StoredTensors
from merge_cli.system.raw_io import FilePool, read_into

# read(ref, start, buffer): what is stored from element `start` on, as much as fits the buffer.
Read = Callable[[TensorRef, int, memoryview], None]


@runtime_checkable
class BulkRead(Protocol):
    """A `Read` that does many short reads in one call."""

    def __call__(self, ref: TensorRef, start: int, buffer: memoryview) -> None: ...

    def pieces(self, ref: TensorRef, starts: Any, out: Any) -> None:
        """See `read_pieces`."""


def read_pieces(read: Read, ref: TensorRef, starts: Any, out: Any) -> None:
    """Fill each row with what is stored from its start on.

    Args:
        starts: numpy int64 [rows], in elements.
        out: numpy [rows, elements], contiguous, of a dtype as wide as the tensor's.
    """
    import numpy as np

    raw = out.view(np.uint8)
    if isinstance(read, BulkRead):
        read.pieces(ref, starts, raw)
        return
    for start, row in zip(starts.tolist(), raw, strict=True):
        read(ref, start, row.data)


class Tensor(Protocol):
    """`TensorRef`, or a frozen, hashable description of a computed tensor.

    Attributes:
        name: as the model calls it.
        model: the source's label, for messages.
        dtype: safetensors dtype of what `fill` fills in.
        default_dtype: dtype that the output has where the recipe names none.
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
    def default_dtype(self) -> str: ...
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


TensorMap = Mapping[str, Tensor]  # a model's tensors by name


def has_names(tensors: TensorMap, names: Collection[str]) -> bool:
    """Whether a model has all of these tensors."""
    return same_names(tensors, names) or all(map(tensors.__contains__, names))


def same_names(tensors: Collection[str], others: Collection[str]) -> bool:
    """Whether two models have the same tensors in the same order, as a rule they do."""
    columns = columns_of(tensors)
    return (columns is not None and columns is columns_of(others)) or [*tensors] == [*others]


def columns_of(tensors: Collection[str]) -> HeaderColumns | None:
    """What is known of a model's tensors without an object for each."""
    return tensors.columns if isinstance(tensors, StoredTensors) else None


def in_order(tensors: TensorMap, names: Sequence[str]) -> list[Tensor]:
    """A model's tensors in the order of these names, which it has."""
    return [*(tensors.values() if [*tensors] == names else map(tensors.__getitem__, names))]


def shapes_in_order(tensors: TensorMap, names: Sequence[str]) -> list[tuple[int, ...]]:
    """Their shapes, in the order of these names."""
    columns = columns_of(tensors)
    if columns is not None and same_names(tensors, names):
        return [*columns.shapes]
    return [*map(attrgetter("shape"), in_order(tensors, names))]


def dtypes_in_order(tensors: TensorMap, names: Sequence[str]) -> list[str]:
    """Their dtypes, in the order of these names."""
    columns = columns_of(tensors)
    if columns is not None and same_names(tensors, names):
        return [*columns.dtypes]
    return [*map(attrgetter("dtype"), in_order(tensors, names))]


def default_dtypes(tensors: TensorMap, names: Sequence[str]) -> list[str]:
    """Their dtypes where the recipe names none, in the order of these names."""
    if columns_of(tensors) is not None:  # what is stored has its own
        return dtypes_in_order(tensors, names)
    return [tensor.default_dtype for tensor in in_order(tensors, names)]


# What input embeddings end with, by architecture.
EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "embed_in.weight",
    "shared.weight",
    "word_embeddings.weight",
    "tok_embeddings.weight",
    "embeddings.weight",
)


class Float32(ABC):
    """What a tensor that is computed in float32 has from the one that it is made of.

    Attributes:
        is_update: it is what a model with an adapter has under this name.
    """

    is_update = False

    @property
    @abstractmethod
    def made_of(self) -> Tensor:
        """The stored tensor that this one is computed from."""

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


def is_weight(tensor: Tensor) -> bool:
    """Whether it is what a model that runs has under this name: stored, or with an adapter."""
    return isinstance(tensor, TensorRef) or (isinstance(tensor, Float32) and tensor.is_update)


@dataclass(frozen=True)
class Zeros:
    """A matrix of zeros, which is read from nowhere: no change. See `Tensor`."""

    name: str
    model: str
    shape: tuple[int, ...]

    @property
    def dtype(self) -> str:
        return "F32"

    @property
    def default_dtype(self) -> str:
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


@contextmanager
def reading() -> Iterator[Read]:
    """A function that reads stored tensors, whatever files they are in; threads may share it."""
    files = FilePool(os.O_RDONLY)

    def read(ref: TensorRef, start: int, buffer: memoryview) -> None:
        offset = ref.offset + start * width_of(ref.dtype)
        read_into(files, ref.path, offset, buffer, ref.model)

    try:
        yield read
    finally:
        files.close()


def read_numbers(read: Read, tensor: Tensor, start: int, count: int) -> Any:
    """Elements [start, start + count) of a tensor of floats: numpy float32, flat."""
    import numpy as np

    raw = np.empty(count * width_of(tensor.dtype), np.uint8)
    if count:
        tensor.fill(read, start, raw.data)
    if tensor.dtype == "BF16":
        return np.left_shift(raw.view(np.uint16), 16, dtype=np.uint32).view(np.float32)
    return raw.view(numpy_dtype(tensor.dtype)).astype(np.float32, copy=False)


def fill_rows(buffer: memoryview, start: int, width: int, rows: Callable[[int, int], Any]) -> None:
    """Fill a buffer with float32 elements from `start` on of a matrix that is computed by rows.

    Args:
        width: of a row.
        rows: makes rows [first, last): numpy float32.
    """
    import numpy as np

    count = len(buffer) // 4
    first, last = start // width, -(-(start + count) // width)
    begin = start - first * width
    out = np.frombuffer(buffer, np.float32)
    out[:] = rows(first, last).reshape(-1)[begin : begin + count]
