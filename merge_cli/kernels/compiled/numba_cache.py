"""What numba has kept on disk, loaded without what only compiling needs.

Before numba compiles or loads its first function, it imports the implementations of everything that
it can compile, and scipy.linalg for products of matrices: longer than all the rest of a small
merge. Machine code needs neither. And where something is compiled, scipy is left out: no loop here
multiplies matrices.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

_BLAS = "scipy.linalg.cython_blas"
_ASKS = "numba.np.arraymath"


def load_kept(
    function: Callable[..., Any], signatures: Sequence[str], options: Mapping[str, Any]
) -> Any:
    """The dispatcher of a function whose machine code an earlier process has kept; else None.

    The function is not looked into: its parts need not be there. Only its code, its file and its
    qualified name tell what was kept for it.

    Raises:
        RuntimeError, OSError, EOFError, UnpicklingError: nothing can be kept, or what was kept
            cannot be read.
    """
    import numba
    from numba.core.caching import FunctionCache
    from numba.core.compiler_lock import global_compiler_lock
    from numba.core.runtime import rtsys

    class Kept(FunctionCache):  # type: ignore[misc]  # numba has no types
        def load_overload(self, sig: Any, target_context: Any) -> Any:
            # As in numba, but for `target_context.refresh()`: that imports all that it compiles.
            rtsys.initialize(target_context)
            with self._guard_against_spurious_io_errors():
                return self._load_overload(sig, target_context)
            return None  # where the block has swallowed an error

    dispatcher = numba.njit(**options)(function)
    kept = Kept(function)
    with global_compiler_lock:
        for signature in signatures:
            result = kept.load_overload(signature, dispatcher.targetctx)
            if result is None:
                return None
            dispatcher.add_overload(result)
    dispatcher.disable_compile()
    return dispatcher


def load_registries() -> None:
    """Import what numba imports before it compiles its first function, but for scipy.

    Code of others in this process still finds scipy: numba asks for it once more when a product of
    matrices is compiled. Does nothing where either is imported already, or numba has been
    rearranged.
    """
    if _BLAS in sys.modules or _ASKS in sys.modules or find_spec("scipy") is None:
        return
    sys.modules[_BLAS] = None  # type: ignore[assignment]  # as Python spells "cannot be imported"
    try:
        arraymath = import_module(_ASKS)
    finally:
        del sys.modules[_BLAS]
    if "_HAVE_BLAS" in vars(arraymath):
        # scipy is there; numba.np.linalg imports it where it is used
        vars(arraymath)["_HAVE_BLAS"] = True
