"""Tensors' numbers as numpy float32, for tensors that are computed from them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from merge_cli.checkpoint.header import DTYPES, TensorRef
from merge_cli.checkpoint.raw import FilePool, read_into
from merge_cli.checkpoint.tensors import Read, Tensor


@contextmanager
def reading() -> Iterator[Read]:
    """A function that reads stored tensors, whatever files they are in; threads may share it."""
    files = FilePool(os.O_RDONLY)

    def read(ref: TensorRef, start: int, buffer: memoryview) -> None:
        offset = ref.offset + start * DTYPES[ref.dtype][0]
        read_into(files, ref.path, offset, buffer, ref.model)

    try:
        yield read
    finally:
        files.close()


def read_numbers(read: Read, tensor: Tensor, start: int, count: int) -> Any:
    """Elements [start, start + count) of a tensor of floats: numpy float32, flat."""
    import numpy as np

    raw = np.empty(count * DTYPES[tensor.dtype][0], np.uint8)
    if count:
        tensor.fill(read, start, raw.data)
    if tensor.dtype == "BF16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    kinds: dict[str, type] = {"F16": np.float16, "F32": np.float32, "F64": np.float64}
    return raw.view(kinds[tensor.dtype]).astype(np.float32)
