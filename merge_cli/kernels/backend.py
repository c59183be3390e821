"""Two kinds of arrays, one formula: numpy arrays run compiled loops, torch tensors run torch.

On a CPU the engine computes with numpy arrays and never imports torch, unless a method needs it; on
a GPU, or where numba is missing, it computes with tensors. A primitive looks at what it was given
and does the same operations in the same order, so that the bytes are the same.

Whether Triton's kernels serve a tensor: where it lies, and whether Triton works there.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any, TypeAlias

# A flat torch tensor or numpy array of float32 or float64.
Array: TypeAlias = Any


def is_numpy(array: Any) -> bool:
    """Whether this is a numpy array, which only the compiled engine hands out."""
    return type(array).__module__ == "numpy"


def matrix(rows: Sequence[Any]) -> Any:
    """(sources, elements) for equally long numpy rows, without copying if they are one already."""
    import numpy as np

    whole = rows[0].base
    if (
        isinstance(whole, np.ndarray)
        and whole.ndim == 2
        and whole.shape == (len(rows), len(rows[0]))
        and whole.flags.c_contiguous
        and all(_starts_at(row, whole[i]) for i, row in enumerate(rows))
    ):
        return whole
    return np.stack(rows)


def joined(parts: Sequence[Any], shape: Sequence[int]) -> Any:
    """Flat arrays, one after another, in this shape; a copy."""
    if is_numpy(parts[0]):
        import numpy as np

        return np.concatenate(parts).reshape(shape)
    import torch

    return torch.cat([*parts]).reshape(tuple(shape))


def _starts_at(row: Any, place: Any) -> bool:
    return bool(row.__array_interface__["data"][0] == place.__array_interface__["data"][0])


def kernels_for(x: Any) -> ModuleType | None:
    """The module of Triton kernels for a tensor on a GPU; None where plain torch must do."""
    if x.device.type != "cuda" or missing():
        return None
    from merge_cli.kernels import triton_kernels

    return triton_kernels


@cache
def missing() -> str:
    """Why Triton cannot be used on this machine's GPUs; empty when it can.

    It compiles with a C compiler that a machine may not have: the smallest kernel is tried.
    """
    try:
        from merge_cli.kernels import triton_kernels

        triton_kernels.keep_mask(1, 0, 0, 0, 2**31, "cuda")
    except Exception as error:
        return f"Triton does not work here ({type(error).__name__}: {error})"
    return ""
