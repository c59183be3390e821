"""What kernels are made of: functions that are compiled into them, and what numba lacks.

A part is never called from Python. Some are no functions but single instructions, calls of the C
library, or calls of another kernel.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import cached_property
from types import FunctionType
from typing import Any

import numpy as np

# C code calls none of this: a wrapper for it would take a tenth of the time to compile.
OPTIONS = {"nogil": True, "error_model": "numpy", "no_cfunc_wrapper": True}


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
        options = OPTIONS | {"fastmath": self._fastmath, "no_cpython_wrapper": True}
        compiled: Callable[..., Any] = numba.njit(**options)(linked(self._function))
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


class New(Part):
    """A new array, of which nothing is set, like `np.empty`: that is compiled for each type anew,
    for a tenth of a second, and imports what numba can do with arrays when it is loaded.

    Args:
        item: numba's name of the type of elements.
        dimensions: how many sizes it takes.
    """

    def __init__(self, item: str, dimensions: int = 1) -> None:
        self._item, self._dimensions = item, dimensions

    @cached_property
    def compiled(self) -> Callable[..., Any]:
        from numba import types
        from numba.core.imputils import impl_ret_new_ref
        from numba.extending import intrinsic
        from numba.np.arrayobj import make_array, populate_array

        array = types.Array(getattr(types, self._item), self._dimensions, "C")

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            sizes = [
                context.cast(builder, size, kind, types.intp)
                for size, kind in zip(arguments, signature.args, strict=True)
            ]
            width = context.get_constant(types.intp, array.dtype.bitwidth // 8)
            strides = [width]
            for size in reversed(sizes):
                strides.insert(0, builder.mul(strides[0], size))
            align = context.get_preferred_array_alignment(array.dtype)
            memory = context.nrt.meminfo_alloc_aligned(builder, size=strides[0], align=align)
            made = make_array(array)(context, builder)
            data = context.nrt.meminfo_data(builder, memory)
            populate_array(
                made,
                data=builder.bitcast(data, made.data.type),
                shape=sizes,
                strides=strides[1:],
                itemsize=width,
                meminfo=memory,
            )
            return impl_ret_new_ref(context, builder, array, made._getvalue())

        def row(typing_context: Any, size: Any) -> Any:
            return array(size), generate

        def rows(typing_context: Any, count: Any, size: Any) -> Any:
            return array(count, size), generate

        compiled: Callable[..., Any] = intrinsic(row if self._dimensions == 1 else rows)
        return compiled

    @cached_property
    def digest(self) -> str:
        return f"{self._item} {self._dimensions}"


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


def named(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with the digest of its parts in its name: what numba keeps it under."""
    return _renamed(function, {}) if _parts(function) else function


def linked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same with its parts as numba wants them, to be compiled."""
    parts = _parts(function)
    compiled = {name: part.compiled for name, part in parts.items()}
    return _renamed(function, compiled) if parts else function


def _renamed(function: Callable[..., Any], names: Mapping[str, Any]) -> Callable[..., Any]:
    result = FunctionType(function.__code__, function.__globals__ | dict(names), function.__name__)
    result.__qualname__ = f"{function.__qualname__}_{_digest(function)}"
    result.__module__ = function.__module__
    return result


def part(*, fastmath: Any = False) -> Callable[[Callable[..., Any]], Part]:
    return lambda function: Part(function, fastmath)


bits_of = BitCast("float32", "uint32")
float_of = BitCast("uint32", "float32")
new_f32, new_f32_rows, new_f64_rows = New("float32"), New("float32", 2), New("float64", 2)
new_u8, new_u8_rows = New("uint8"), New("uint8", 2)
new_u32, new_u32_rows, new_f64 = New("uint32"), New("uint32", 2), New("float64")
new_i32, new_i32_rows, new_i64 = New("int32"), New("int32", 2), New("int64")
as_bytes, as_halves, as_words = View("uint8"), View("uint16"), View("uint32")
