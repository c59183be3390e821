"""What numba has kept is loaded without its registries, and compiled without scipy.

Whoever else compiles in the same process finds numba as it always is.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

_LOADED = """
import sys
import numpy as np
from merge_cli.kernels import compiled
raw, base = np.array([[0x3F80, 0x4000], [0x4040, 0x3F80]], np.uint16), np.empty(2, np.float32)
rows = np.empty((1, 2), np.float32)
compiled.decode_bf16(raw, rows, base, True, True)
assert base.tolist() == [1, 2] and rows.tolist() == [[2, -1]]
"""
_READY = '"numba.np.npyimpl" in sys.modules'
_ALONE = f"assert not {_READY}, 'numba has made ready to compile'\n"
_COMPILED = """
kernel = compiled.decode_bf16
kernel = compiled.Kernel(kernel._function, kernel._signature, kernel._fastmath)
kernel._made()
assert "scipy.linalg" not in sys.modules, "scipy was imported"
"""
_OTHERS = """
import numba
assert numba.njit(lambda a: a.sum() + len(str(3)))(np.ones(3)) == 4.0
assert numba.njit(lambda a, b: a @ b)(np.eye(3), np.eye(3)).trace() == 3.0
assert "scipy.linalg" in sys.modules
"""


def run(*parts: str) -> None:
    subprocess.run([sys.executable, "-c", "".join(parts)], check=True, timeout=300)


def test_what_is_kept_is_loaded_alone() -> None:
    run(_LOADED)  # from now on it is kept
    run(_LOADED, _ALONE)


def test_others_compile_after_what_was_loaded() -> None:
    pytest.importorskip("scipy")
    run(_LOADED, _OTHERS)


def test_scipy_is_imported_for_those_who_need_it() -> None:
    pytest.importorskip("scipy")
    run(_COMPILED.replace("\n", f"\n{_LOADED}", 1), _OTHERS)
