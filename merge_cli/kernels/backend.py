"""Which backend computes: chosen here, from the array, and nowhere else.

A primitive is one operation, called like a function and written once for each backend:

    @primitive()                       the reference: plain torch, the definition of the result
    def scaled(x, factor): ...

    @scaled.compiled                   numpy arrays: loops that numba compiles (`kernels.compiled`)
    def _scaled_compiled(x, factor): ...

    @scaled.triton                     CUDA tensors, where Triton works; else the reference
    def _scaled_triton(x, factor): ...

On a CPU the engine computes with numpy arrays and never imports torch, unless a method needs it; on
a GPU, or where numba is missing, it computes with tensors. All backends do the same operations in
the same order, so that the bytes are the same; the tests compare them bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, update_wrapper
from typing import Any, Generic, Literal, ParamSpec, TypeAlias, TypeVar

# A flat torch tensor or numpy array of float32 or float64.
Array: TypeAlias = Any
Backend = Literal["compiled", "numpy", "torch", "triton"]

P = ParamSpec("P")
R = TypeVar("R")


def backend_of(array: Any) -> Backend:
    """The backend for an array, or for the tensors of a torch device."""
    if type(array).__module__ == "numpy":  # which only the compiled engine hands out
        return "compiled"
    device = getattr(array, "device", array)
    return "torch" if device.type != "cuda" or missing() else "triton"


def host_backend() -> Backend:
    """The backend for work that is done in numpy on every machine: plain where numba is missing."""
    from merge_cli.kernels import compiled

    return "numpy" if compiled.available() else "compiled"


class Primitive(Generic[P, R]):
    """An operation with an implementation for each backend; see the module's text.

    Attributes:
        reference: the plain implementation, which takes tensors of any device.
    """

    def __init__(
        self, reference: Callable[P, R], choose: Callable[[Sequence[Any]], Backend]
    ) -> None:
        self.reference = reference
        self._choose = choose
        self._implementations: dict[Backend, Callable[P, R]] = {
            "numpy": reference,
            "torch": reference,
            "triton": reference,
        }
        update_wrapper(self, reference)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._implementations[self._choose(args)](*args, **kwargs)

    def compiled(self, function: Callable[P, R]) -> Callable[P, R]:
        """Adds the implementation for numpy arrays."""
        self._implementations["compiled"] = function
        return function

    def triton(self, function: Callable[P, R]) -> Callable[P, R]:
        """Adds the implementation for CUDA tensors."""
        self._implementations["triton"] = function
        return function


def primitive(position: int = 0) -> Callable[[Callable[P, R]], Primitive[P, R]]:
    """A primitive whose backend follows from one positional argument.

    Args:
        position: of an array, of a sequence of arrays (the first one decides), or of a device.
    """

    def choose(args: Sequence[Any]) -> Backend:
        arrays = args[position]
        return backend_of(arrays[0] if isinstance(arrays, list | tuple) else arrays)

    return lambda reference: Primitive(reference, choose)


def host_primitive(reference: Callable[P, R]) -> Primitive[P, R]:
    """A primitive over numpy arrays alone, whose reference is plain numpy."""
    return Primitive(reference, lambda args: host_backend())


def array_primitive(reference: Callable[P, R]) -> Primitive[P, R]:
    """A primitive over a numpy array, on every machine, or over a tensor of torch.

    The first argument decides; the reference takes both.
    """

    def choose(args: Sequence[Any]) -> Backend:
        backend = backend_of(args[0])
        return host_backend() if backend == "compiled" else backend

    return Primitive(reference, choose)


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


def matrix(rows: Sequence[Any]) -> Any:
    """(sources, elements) for equally long numpy rows, without copying if they are one already."""
    import numpy as np

    block = rows[0].base
    if (
        isinstance(block, np.ndarray)
        and block.ndim == 2
        and block.dtype == rows[0].dtype  # else rows are its bytes, read as something else
        and block.shape == (len(rows), len(rows[0]))
        and block.flags.c_contiguous
        and all(_same_start(row, block[i]) for i, row in enumerate(rows))
    ):
        return block
    return np.stack(rows)


def _same_start(row: Any, other: Any) -> bool:
    return bool(row.__array_interface__["data"][0] == other.__array_interface__["data"][0])


@primitive()
def joined(parts: Sequence[Array], shape: Sequence[int]) -> Array:
    """Flat arrays, one after another, in this shape; a copy."""
    import torch

    return torch.cat([*parts]).reshape(tuple(shape))


@joined.compiled
def _joined_numpy(parts: Sequence[Array], shape: Sequence[int]) -> Array:
    import numpy as np

    return np.concatenate(parts).reshape(shape)


@primitive()
def to_numpy(array: Array) -> Any:
    """The array as numpy's; a copy only where it lies on a GPU."""
    return array.cpu().numpy()


@to_numpy.compiled
def _numpy_already(array: Array) -> Any:
    return array


@primitive()
def like(array: Array, values: Any) -> Array:
    """Numpy's values as an array of the kind, dtype and device of `array`."""
    import torch

    return torch.from_numpy(values).to(array.device, array.dtype)


@like.compiled
def _like_numpy(array: Array, values: Any) -> Array:
    return values.astype(array.dtype)


@primitive()
def is_finite(array: Array) -> Array:
    """Which elements are finite numbers."""
    return array.isfinite()


@is_finite.compiled
def _is_finite_numpy(array: Array) -> Array:
    import numpy as np

    return np.isfinite(array)
