"""Instructions that numba lacks, or makes long work of.

Each is a part of kernels, like a function: casts of bits, views, windows and new arrays, calls of
the C library and of other kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

from merge_cli.kernels.compiled.parts import Part


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


class Window(Part):
    """Some elements of a contiguous array, as an array: `window(array, first, count)`.

    Elements are counted through all dimensions. A slice is cut where the array ends, which takes a
    dozen instructions and makes its length unknown; here nobody looks whether the array reaches so
    far, and a loop over a constant `count` is unrolled.
    """

    @cached_property
    def compiled(self) -> Callable[..., Any]:
        from numba import types
        from numba.extending import intrinsic

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            source = _array(context, builder, signature, arguments)
            first, count = (
                context.cast(builder, value, kind, types.intp)
                for value, kind in zip(arguments[1:], signature.args[1:], strict=True)
            )
            data = builder.gep(source.data, [first])
            return _row(context, builder, signature, source, data, count)

        def window(typing_context: Any, array: Any, first: Any, count: Any) -> Any:
            return _row_type(array)(array, first, count), generate

        compiled: Callable[..., Any] = intrinsic(window)
        return compiled

    @cached_property
    def digest(self) -> str:
        return "window"


class Copy(Part):
    """A copy of some elements, counted in the same way, in the frame of the function.

    `copy(array, first)`. No other array lies there. So a loop that reads it and writes elsewhere
    becomes vectors without a look at what may overlap.

    Args:
        count: how many.
    """

    def __init__(self, count: int) -> None:
        self._count = count

    @cached_property
    def compiled(self) -> Callable[..., Any]:
        from llvmlite import ir  # type: ignore[import-untyped]
        from numba import types
        from numba.core import cgutils
        from numba.extending import intrinsic

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            source = _array(context, builder, signature, arguments)
            element = source.data.type.pointee
            all_of_them = ir.VectorType(element, self._count)
            frame = cgutils.alloca_once(builder, all_of_them)
            first = context.cast(builder, arguments[1], signature.args[1], types.intp)
            start = builder.gep(source.data, [first])
            stored = builder.bitcast(start, all_of_them.as_pointer())
            builder.store(builder.load(stored, align=1), frame)
            data = builder.bitcast(frame, element.as_pointer())
            count = context.get_constant(types.intp, self._count)
            return _row(context, builder, signature, source, data, count)

        def copy(typing_context: Any, array: Any, first: Any) -> Any:
            return _row_type(array)(array, first), generate

        compiled: Callable[..., Any] = intrinsic(copy)
        return compiled

    @cached_property
    def digest(self) -> str:
        return f"copy of {self._count}"


def _array(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    """The first argument, as what it is made of."""
    from numba.np.arrayobj import make_array

    return make_array(signature.args[0])(context, builder, arguments[0])


def _row_type(array: Any) -> Any:
    from numba import types
    from numba.core.errors import NumbaTypeError

    if array.layout != "C":
        raise NumbaTypeError("only contiguous arrays can be taken so")
    return types.Array(array.dtype, 1, "C")


def _row(context: Any, builder: Any, signature: Any, source: Any, data: Any, count: Any) -> Any:
    """An array of one dimension at `data`, which lives as long as its source."""
    from numba.core.imputils import impl_ret_borrowed
    from numba.np.arrayobj import make_array, populate_array

    made = make_array(signature.return_type)(context, builder)
    populate_array(
        made,
        data=data,
        shape=[count],
        strides=[source.itemsize],
        itemsize=source.itemsize,
        meminfo=source.meminfo,
        parent=source.parent,
    )
    return impl_ret_borrowed(context, builder, signature.return_type, made._getvalue())


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


bits_of = BitCast("float32", "uint32")
float_of = BitCast("uint32", "float32")
new_f32, new_f32_rows, new_f64_rows = New("float32"), New("float32", 2), New("float64", 2)
new_u8, new_u8_rows = New("uint8"), New("uint8", 2)
new_u32, new_u32_rows, new_f64 = New("uint32"), New("uint32", 2), New("float64")
new_i32, new_i32_rows, new_i64 = New("int32"), New("int32", 2), New("int64")
as_bytes, as_halves, as_words = View("uint8"), View("uint16"), View("uint32")
window, copy_16, copy_32, copy_64 = Window(), Copy(16), Copy(32), Copy(64)
