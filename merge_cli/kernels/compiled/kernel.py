"""How a loop is compiled.

numba compiles a function when it is first called and keeps the machine code on disk, so that later
processes only load it.
"""

from __future__ import annotations

import hashlib
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from types import FunctionType
from typing import Any

import numpy as np

from merge_cli.system.notices import say_once

CHUNK = 2048  # float32: a few rows of it stay in the L1 cache
U32 = np.uint32
F32 = np.float32
MAGNITUDE = U32(0x7FFFFFFF)  # the bits of a float32 but its sign
INFINITY = U32(0x7F800000)

# C code calls none of this: a wrapper for it would take a tenth of the time to compile.
_OPTIONS = {"nogil": True, "error_model": "numpy", "no_cfunc_wrapper": True}
_UNKEPT = (
    "compiling the loops of this method, up to a minute, because there is no folder to keep them "
    "in. Set NUMBA_CACHE_DIR to one that can be written."
)
_COMPILING = (
    "compiling loops for this machine: some seconds, the first time. They are kept for later runs."
)


class Part:
    """A function that kernels are made of. It is compiled into each of them, and never called here.

    Attributes:
        digest: of its code and of its own parts, so that a kernel that is kept on disk is not taken
            for one of other parts: numba looks at the file of the kernel alone.
    """

    def __init__(self, function: Callable[..., Any], fastmath: Any) -> None:
        self._function, self._fastmath = function, fastmath

    @cached_property
    def compiled(self) -> Callable[..., Any]:
        import numba

        # It is called by compiled code alone: a wrapper for Python would be compiled for nothing.
        options = _OPTIONS | {"fastmath": self._fastmath, "no_cpython_wrapper": True}
        compiled: Callable[..., Any] = numba.njit(**options)(_linked(self._function))
        return compiled

    @cached_property
    def digest(self) -> str:
        return _digest(self._function)


class BitCast(Part):
    """The bits of a number taken for another type, without a way through memory.

    Args:
        source, target: numba's names of types of the same width.
    """

    def __init__(self, source: str, target: str) -> None:
        self._source, self._target = source, target

    @cached_property
    def compiled(self) -> Callable[..., Any]:
        from numba import types
        from numba.extending import intrinsic

        source, target = getattr(types, self._source), getattr(types, self._target)

        def bit_cast(typing_context: Any, value: Any) -> Any:
            def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
                return builder.bitcast(arguments[0], context.get_value_type(target))

            return target(source), generate

        compiled: Callable[..., Any] = intrinsic(bit_cast)
        return compiled

    @cached_property
    def digest(self) -> str:
        return f"{self._source} as {self._target}"


class View(Part):
    """The bytes of a contiguous array as another type, like `ndarray.view`, which costs 0.1 s to
    compile for each pair of types.

    Args:
        target: numba's name of the type; the bytes are a whole number of it.
    """

    def __init__(self, target: str) -> None:
        self._target = target

    @cached_property
    def compiled(self) -> Callable[..., Any]:
        from numba import types
        from numba.core.errors import NumbaTypeError
        from numba.core.imputils import impl_ret_borrowed
        from numba.extending import intrinsic
        from numba.np.arrayobj import make_array, populate_array

        target = types.Array(getattr(types, self._target), 1, "C")

        def view(typing_context: Any, array: Any) -> Any:
            if array.ndim != 1 or array.layout != "C":
                raise NumbaTypeError("only contiguous arrays of one dimension can be taken so")

            def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
                given = make_array(signature.args[0])(context, builder, arguments[0])
                viewed = make_array(target)(context, builder)
                width = context.get_constant(types.intp, target.dtype.bitwidth // 8)
                count = builder.udiv(builder.mul(given.nitems, given.itemsize), width)
                populate_array(
                    viewed,
                    data=builder.bitcast(given.data, viewed.data.type),
                    shape=[count],
                    strides=[width],
                    itemsize=width,
                    meminfo=given.meminfo,
                    parent=given.parent,
                )
                return impl_ret_borrowed(context, builder, target, viewed._getvalue())

            return target(array), generate

        compiled: Callable[..., Any] = intrinsic(view)
        return compiled

    @cached_property
    def digest(self) -> str:
        return self._target


class CFunction(Part):
    """A function of the C library, called without Python's lock.

    Args:
        name: its symbol.
        signature: numba's; pointers are `u8`.
    """

    def __init__(self, name: str, signature: str) -> None:
        self._name, self._signature = name, signature

    @cached_property
    def compiled(self) -> Callable[..., Any]:
        from numba import types
        from numba.core.sigutils import normalize_signature

        arguments, result = normalize_signature(self._signature)
        external: Callable[..., Any] = types.ExternalFunction(self._name, result(*arguments))
        return external

    @cached_property
    def digest(self) -> str:
        return f"{self._name} {self._signature}"


class AddressCall(Part):
    """Calls a kernel of this signature: `call(address, (argument, ...))`."""

    def __init__(self, signature: str) -> None:
        self._signature = signature

    @cached_property
    def compiled(self) -> Callable[..., Any]:
        from numba.core import cgutils
        from numba.core.sigutils import normalize_signature
        from numba.extending import intrinsic

        expected, result = normalize_signature(self._signature)

        def call(typing_context: Any, address: Any, arguments: Any) -> Any:
            def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
                convention = context.call_conv
                pointer = convention.get_function_type(result, expected).as_pointer()
                function = builder.inttoptr(values[0], pointer)
                given = [
                    context.cast(builder, value, kind, target)
                    for value, kind, target in zip(
                        cgutils.unpack_tuple(builder, values[1]), arguments, expected, strict=True
                    )
                ]
                status, returned = convention.call_function(
                    builder, function, result, expected, given
                )
                with cgutils.if_unlikely(builder, status.is_error):
                    convention.return_status_propagate(builder, status)
                return returned

            return result(address, arguments), generate

        compiled: Callable[..., Any] = intrinsic(call)
        return compiled

    @cached_property
    def digest(self) -> str:
        return self._signature


def _parts(function: Callable[..., Any]) -> dict[str, Part]:
    names = function.__globals__
    used = {name: names.get(name) for name in function.__code__.co_names}
    return {name: value for name, value in used.items() if isinstance(value, Part)}


def _digest(function: Callable[..., Any]) -> str:
    code, names = function.__code__, function.__globals__
    content = [code.co_code, code.co_consts, code.co_names]
    content += [
        names[n] for n in code.co_names if isinstance(names.get(n), int | float | np.generic)
    ]
    content += [part.digest for part in _parts(function).values()]
    return hashlib.sha256(repr(content).encode()).hexdigest()[:12]


def _linked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its parts as numba wants them, and their digest in its name."""
    parts = _parts(function)
    if not parts:
        return function
    names = function.__globals__ | {name: part.compiled for name, part in parts.items()}
    linked = FunctionType(function.__code__, names, function.__name__)
    linked.__qualname__ = f"{function.__qualname__}_{_digest(function)}"
    linked.__module__ = function.__module__
    return linked


class Kernel:
    """A function that is compiled at its first call.

    Attributes:
        by_address: calls it inside other kernels, which get its `address` as an argument. It is
            compiled once, for all of them.
    """

    def __init__(
        self, function: Callable[..., Any], signature: str | list[str], fastmath: Any
    ) -> None:
        self.by_address = AddressCall(str(signature))
        self._function, self._signature, self._fastmath = function, signature, fastmath
        self._compiled: Callable[..., Any] | None = None
        self._address = 0
        self._lock = threading.Lock()

    def __call__(self, *arguments: Any) -> Any:
        compiled = self._compiled
        if compiled is None:
            compiled = self.load()
        return compiled(*arguments)

    @property
    def address(self) -> int:
        """Of the machine code, for `by_address`; of kernels with one signature."""
        if not self._address:
            self.load()
        return self._address

    def load(self) -> Callable[..., Any]:
        """Compile, or load what an earlier process has compiled."""
        import numba

        from merge_cli.kernels.compiled.numba_import import load_registries

        with self._lock:
            if self._compiled is None:
                load_registries()
                options = _OPTIONS | {"fastmath": self._fastmath}
                function = _linked(self._function)
                try:
                    with _saying_so():
                        compiled = numba.njit(self._signature, cache=True, **options)(function)
                except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
                    if isinstance(error, RuntimeError) and "cannot cache" not in str(error):
                        raise
                    # No folder can be written, or what is in it cannot be read: compile each time.
                    say_once(_UNKEPT)
                    compiled = numba.njit(self._signature, **options)(function)
                result = next(iter(compiled.overloads.values()))
                name = result.fndesc.llvm_func_name
                self._address = result.library.get_pointer_to_function(name)
                self._compiled = compiled
            return self._compiled


@contextmanager
def _saying_so() -> Iterator[None]:
    """Tell the user once when numba begins to compile, and not when it loads what it has kept."""
    from numba.core import event

    class Listener(event.Listener):  # type: ignore[misc]  # numba has no types
        def on_start(self, event: Any) -> None:
            say_once(_COMPILING)

        def on_end(self, event: Any) -> None:
            pass

    with event.install_listener("numba:compile", Listener()):
        yield


def kernel(
    signature: str | list[str], *, fastmath: Any = False
) -> Callable[[Callable[..., Any]], Kernel]:
    return lambda function: Kernel(function, signature, fastmath)


def part(*, fastmath: Any = False) -> Callable[[Callable[..., Any]], Part]:
    return lambda function: Part(function, fastmath)


bits_of = BitCast("float32", "uint32")
float_of = BitCast("uint32", "float32")
as_bytes, as_halves, as_words = View("uint8"), View("uint16"), View("uint32")


@cache
def available() -> str:
    """Why the compiled primitives cannot be used; empty when they can."""
    try:
        import numba
    except ImportError as error:
        return f"numba cannot be imported ({error})"
    return "NUMBA_DISABLE_JIT is set" if numba.config.DISABLE_JIT else ""
