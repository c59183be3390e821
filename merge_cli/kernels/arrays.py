"""Two kinds of arrays, one formula: numpy arrays run compiled loops, torch tensors run torch.

On a CPU the engine computes with numpy arrays and never imports torch, unless a method needs it; on
a GPU, or where numba is missing, it computes with tensors. A primitive looks at what it was given
and does the same operations in the same order, so that the bytes are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
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
