"""Stored numbers as numpy float32, for tensors that are computed from them."""

from __future__ import annotations

from typing import Any

from merge_cli.checkpoint.header import DTYPES, TensorRef
from merge_cli.checkpoint.tensors import Read


def read_numbers(read: Read, ref: TensorRef, start: int, count: int) -> Any:
    """Elements [start, start + count) of a stored tensor of floats: numpy float32, flat."""
    import numpy as np

    raw = np.empty(count * DTYPES[ref.dtype][0], np.uint8)
    if count:
        read(ref, start, raw.data)
    if ref.dtype == "BF16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    kinds: dict[str, type] = {"F16": np.float16, "F32": np.float32, "F64": np.float64}
    return raw.view(kinds[ref.dtype]).astype(np.float32)
