"""Which stored tensor is at fault where NaN or Inf was read, of a weight or of what is computed.

A weight with an adapter, a quantised one, one with another vocabulary: each is computed from
several stored tensors, in several files. The file to be replaced is the one that holds the NaN, and
where none does, it is what they make together that is not finite.
"""

from __future__ import annotations

from typing import Any

from merge_cli.checkpoint.dtypes import MERGEABLE, width_of
from merge_cli.checkpoint.headers import TensorRef
from merge_cli.checkpoint.tensors import Read, Tensor, read_numbers, reading
from merge_cli.errors import NonFiniteError

_AT_ONCE = 2**20  # elements
# In formats of 8 bits: the bits that are looked at, and from where on they are NaN or Inf.
_NOT_FINITE = {"F8_E4M3": (0x7F, 0x7F), "F8_E5M2": (0x7F, 0x7C), "F8_E8M0": (0xFF, 0xFF)}


def non_finite_error(
    tensor: Tensor, element: int | None, *, hint: str, together: str
) -> NonFiniteError:
    """What is said of a tensor with NaN or Inf.

    Args:
        element: the first that is not finite, where that is known.
        hint: what to do where a file holds it.
        together: what to do where only what is computed from several tensors is not finite.
    """
    if isinstance(tensor, TensorRef):
        return _held_by(tensor, element, hint)
    with reading() as read:
        for ref in tensor.stored:
            at = _first(read, ref)
            if at is not None:
                return _held_by(ref, at, hint)
    files = dict.fromkeys(ref.path.name for ref in tensor.stored)
    finite = "its numbers are finite, and " if all(map(_is_float, tensor.stored)) else ""
    message = f"{finite}what is computed from them has NaN or Inf{_at(element)}"
    where = " and ".join(files)
    return NonFiniteError(
        message, model=tensor.model, file=where, tensor=tensor.name, hint=together
    )


def _at(element: int | None) -> str:
    return "" if element is None else f" (first at element {element})"


def _held_by(ref: TensorRef, element: int | None, hint: str) -> NonFiniteError:
    message = f"NaN or Inf among its weights{_at(element)}"
    return NonFiniteError(message, model=ref.model, file=ref.path.name, tensor=ref.name, hint=hint)


def _is_float(ref: TensorRef) -> bool:
    return ref.dtype in MERGEABLE or ref.dtype in _NOT_FINITE


def _first(read: Read, ref: TensorRef) -> int | None:
    """The first element that is not finite; None without any, and of codes."""
    import numpy as np

    if not _is_float(ref):
        return None
    for start in range(0, ref.size, _AT_ONCE):
        marks = _marks(read, ref, start, min(_AT_ONCE, ref.size - start))
        if marks.any():
            return start + int(np.argmax(marks))
    return None


def _marks(read: Read, ref: TensorRef, start: int, count: int) -> Any:
    """Which elements are not finite: numpy bool."""
    import numpy as np

    if ref.dtype in MERGEABLE and ref.dtype != "F64":
        return ~np.isfinite(read_numbers(read, ref, start, count))
    raw = np.empty(count * width_of(ref.dtype), np.uint8)
    ref.fill(read, start, raw.data)
    if ref.dtype == "F64":  # which is finite though float32 does not hold it
        return ~np.isfinite(raw.view(np.float64))
    bits, least = _NOT_FINITE[ref.dtype]
    return (raw & bits) >= least
