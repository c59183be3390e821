"""What kernels are made of: functions that are compiled into them.

A part is never called from Python. Some are no functions but a few instructions: see `arrays` and
`instructions`.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cached_property
from types import FunctionType
from typing import Any

import numpy as np

# C code calls none of this: a wrapper for it would take a tenth of the time to compile.
OPTIONS = {"nogil": True, "error_model": "numpy", "no_cfunc_wrapper": True}


class Part(ABC):
    """What kernels are made of. It is compiled into each of them, and never called here."""

    @property
    @abstractmethod
    def compiled(self) -> Callable[..., Any]:
        """What numba takes in its place."""

    @property
    @abstractmethod
    def digest(self) -> str:
        """Of all that it is made of, so that a kernel that is kept on disk is not taken for one of
        other parts: numba looks at the file of the kernel alone.
        """


class FunctionPart(Part):
    """A function, with parts of its own."""

    def __init__(self, function: Callable[..., Any], fastmath: Any, inline: bool) -> None:
        self._function, self._fastmath, self._inline = function, fastmath, inline

    @cached_property
    def compiled(self) -> Callable[..., Any]:
        import numba

        # It is called by compiled code alone: a wrapper for Python would be compiled for nothing.
        options = OPTIONS | {
            "fastmath": self._fastmath,
            "no_cpython_wrapper": True,
            "forceinline": self._inline,
        }
        compiled: Callable[..., Any] = numba.njit(**options)(linked(self._function))
        return compiled

    @cached_property
    def digest(self) -> str:
        return _digest(self._function)


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


def part(
    *, fastmath: Any = False, inline: bool = False
) -> Callable[[Callable[..., Any]], FunctionPart]:
    """A function for kernels.

    Args:
        inline: its code is copied to wherever it is called. A call counts the references of each
            array, which takes as long as a hundred elements do. What is short is copied anyway.
    """
    return lambda function: FunctionPart(function, fastmath, inline)
