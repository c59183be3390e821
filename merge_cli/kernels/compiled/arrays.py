"""Arrays inside of kernels, of which numba makes long work: views, windows, copies, new ones.

Each is a part of kernels that becomes a few instructions, without a look at bounds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

from merge_cli.kernels.compiled.parts import Part


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
        from numba.extending import intrinsic

        target = types.Array(getattr(types, self._target), 1, "C")

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            source = _array(context, builder, signature, arguments)
            size = builder.mul(source.nitems, source.itemsize)
            count = builder.udiv(size, _width(context, target))
            return _row(context, builder, signature, source, source.data, count)

        def view(typing_context: Any, array: Any) -> Any:
            if array.ndim != 1 or array.layout != "C":
                raise NumbaTypeError("only contiguous arrays of one dimension can be taken so")
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
        from llvmlite import ir
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


def _width(context: Any, array: Any) -> Any:
    """Bytes of an element, as a constant."""
    from numba import types

    return context.get_constant(types.intp, array.dtype.bitwidth // 8)


def _row(context: Any, builder: Any, signature: Any, source: Any, data: Any, count: Any) -> Any:
    """An array of one dimension at `data`, which lives as long as its source."""
    from numba.core.imputils import impl_ret_borrowed
    from numba.np.arrayobj import make_array, populate_array

    made = make_array(signature.return_type)(context, builder)
    width = _width(context, signature.return_type)
    populate_array(
        made,
        data=builder.bitcast(data, made.data.type),
        shape=[count],
        strides=[width],
        itemsize=width,
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
            width = _width(context, array)
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


new_f32, new_f32_rows, new_f64_rows = New("float32"), New("float32", 2), New("float64", 2)
new_u8, new_u8_rows = New("uint8"), New("uint8", 2)
new_u32, new_u32_rows, new_f64 = New("uint32"), New("uint32", 2), New("float64")
new_i32, new_i32_rows, new_i64 = New("int32"), New("int32", 2), New("int64")
as_bytes, as_halves, as_words = View("uint8"), View("uint16"), View("uint32")
window, copy_16, copy_32, copy_64 = Window(), Copy(16), Copy(32), Copy(64)
