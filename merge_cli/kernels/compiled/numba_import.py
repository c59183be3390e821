"""numba's registries without scipy: two thirds of the time that the first loop takes to load.

When numba compiles or loads its first function, it looks whether scipy has BLAS, which imports
scipy.linalg and with it 77 modules. No loop here needs BLAS. Code of others in this process that
does still finds it: numba asks scipy once more when a product of matrices is compiled.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec

_BLAS = "scipy.linalg.cython_blas"
_ASKS = "numba.np.arraymath"


def load_registries() -> None:
    """Import what numba imports with its first function, but for scipy.

    Does nothing where either is imported already, or numba has been rearranged.
    """
    if _BLAS in sys.modules or _ASKS in sys.modules or find_spec("scipy") is None:
        return
    sys.modules[_BLAS] = None  # type: ignore[assignment]  # as Python spells "cannot be imported"
    try:
        arraymath = import_module(_ASKS)
    finally:
        del sys.modules[_BLAS]
    if hasattr(arraymath, "_HAVE_BLAS"):
        vars(arraymath)["_HAVE_BLAS"] = True  # scipy is there; numba.np.linalg imports it where it is used
