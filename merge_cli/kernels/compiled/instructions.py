"""Casts of bits, and calls of the C library and of other kernels: parts that numba lacks."""

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
