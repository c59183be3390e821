"""How a loop is compiled.

numba compiles a function when it is first called and keeps the machine code on disk, so that later
processes only load it.
"""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from merge_cli.system.notices import say_once

CHUNK = 2048  # float32: a few rows of it stay in the L1 cache
U32 = np.uint32
F32 = np.float32
MAGNITUDE = U32(0x7FFFFFFF)  # the bits of a float32 but its sign
INFINITY = U32(0x7F800000)

_UNKEPT = (
    "compiling the loops of this method, up to a minute, because there is no folder to keep them "
    "in. Set NUMBA_CACHE_DIR to one that can be written."
)


class Kernel:
    """A function that is compiled at its first call."""

    def __init__(
        self, function: Callable[..., Any], signature: str | list[str], fastmath: Any
    ) -> None:
        self._function, self._signature, self._fastmath = function, signature, fastmath
        self._compiled: Callable[..., Any] | None = None
        self._lock = threading.Lock()

    def __call__(self, *arguments: Any) -> Any:
        compiled = self._compiled
        if compiled is None:
            compiled = self.load()
        return compiled(*arguments)

    def load(self) -> Callable[..., Any]:
        """Compile, or load what an earlier process has compiled."""
        import numba

        from merge_cli.kernels.compiled.numba_import import load_registries

        with self._lock:
            if self._compiled is None:
                load_registries()
                options = {"nogil": True, "error_model": "numpy", "fastmath": self._fastmath}
                try:
                    compiled = numba.njit(self._signature, cache=True, **options)(self._function)
                except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
                    if isinstance(error, RuntimeError) and "cannot cache" not in str(error):
                        raise
                    # No folder can be written, or what is in it cannot be read: compile each time.
                    say_once(_UNKEPT)
                    compiled = numba.njit(self._signature, **options)(self._function)
                self._compiled = compiled
            return self._compiled


def kernel(
    signature: str | list[str], *, fastmath: Any = False
) -> Callable[[Callable[..., Any]], Kernel]:
    return lambda function: Kernel(function, signature, fastmath)


@cache
def available() -> str:
    """Why the compiled primitives cannot be used; empty when they can."""
    try:
        import numba
    except ImportError as error:
        return f"numba cannot be imported ({error})"
    return "NUMBA_DISABLE_JIT is set" if numba.config.DISABLE_JIT else ""
