"""How a loop is compiled.

numba compiles a function when it is first called and keeps the machine code on disk, so that later
processes only load it.
"""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np

from merge_cli.kernels.compiled.instructions import AddressCall
from merge_cli.kernels.compiled.parts import OPTIONS, linked, named
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
_COMPILING = (
    "compiling loops for this machine: some seconds, the first time. They are kept for later runs."
)


class Kernel:
    """A function that is compiled at its first call.

    Attributes:
        by_address: calls it inside other kernels, which get its `address` as an argument. It is
            compiled once, for all of them.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        signature: str | list[str],
        fastmath: Any = False,
        side_by_side: bool = False,
    ) -> None:
        self.by_address = AddressCall(str(signature))
        self._function, self._signature, self._fastmath = function, signature, fastmath
        self._side_by_side = side_by_side
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
        """Load what an earlier process has compiled, or compile."""
        with self._lock:
            if self._compiled is None:
                compiled = self._kept() or self._made()
                result = next(iter(compiled.overloads.values()))
                name = result.fndesc.llvm_func_name
                self._address = result.library.get_pointer_to_function(name)
                self._compiled = compiled
            return self._compiled

    @property
    def _options(self) -> dict[str, Any]:
        return OPTIONS | {"fastmath": self._fastmath}

    def _kept(self) -> Any:
        """What is on disk; None where nothing is, or nothing that can be read."""
        from merge_cli.kernels.compiled.numba_cache import load_kept

        listed = [self._signature] if isinstance(self._signature, str) else self._signature
        try:
            return load_kept(named(self._function), listed, self._options)
        except _UNREADABLE as error:
            _refuse_other(error)
            return None

    def _made(self) -> Any:
        """Compiled, and kept where there is a folder that can be written."""
        import numba

        from merge_cli.kernels.compiled.numba_cache import load_registries

        load_registries()
        function = linked(self._function)
        try:
            with _saying_so(), _vectors(self._side_by_side):
                return numba.njit(self._signature, cache=True, **self._options)(function)
        except _UNREADABLE as error:
            _refuse_other(error)
            say_once(_UNKEPT)
            return numba.njit(self._signature, **self._options)(function)


_UNREADABLE = (RuntimeError, OSError, EOFError, pickle.UnpicklingError)


def _refuse_other(error: Exception) -> None:
    """Raise what is not about the folder: no place to write, or a file that cannot be read."""
    if isinstance(error, RuntimeError) and "cannot cache" not in str(error):
        raise error


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


@contextmanager
def _vectors(side_by_side: bool) -> Iterator[None]:
    """Let LLVM look for vectors in what stands side by side, too, which numba leaves out."""
    from numba.core import config
    from numba.core.compiler_lock import global_compiler_lock

    with global_compiler_lock:
        before, config.SLP_VECTORIZE = config.SLP_VECTORIZE, int(side_by_side)
        try:
            yield
        finally:
            config.SLP_VECTORIZE = before


def kernel(
    signature: str | list[str], *, fastmath: Any = False, side_by_side: bool = False
) -> Callable[[Callable[..., Any]], Kernel]:
    """A function to compile.

    Args:
        signature: numba's, or several.
        side_by_side: loops of a few steps are unrolled, and become vectors. It is for those whose
            length is a constant; elsewhere it only takes time to compile.
    """
    return lambda function: Kernel(function, signature, fastmath, side_by_side)


@cache
def available() -> str:
    """Why the compiled primitives cannot be used; empty when they can."""
    try:
        import numba
    except ImportError as error:
        return f"numba cannot be imported ({error})"
    return "NUMBA_DISABLE_JIT is set" if numba.config.DISABLE_JIT else ""
