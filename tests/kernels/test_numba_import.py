"""Loading compiled loops leaves scipy alone, and numba's products of matrices as they were."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("scipy")

_CHECK = """
import sys
from merge_cli.kernels import compiled
compiled.decode_bf16.load()
assert "scipy.linalg" not in sys.modules, "scipy was imported"
import numba, numpy as np
assert numba.njit(lambda a, b: a @ b)(np.eye(3), np.eye(3)).trace() == 3.0
assert "scipy.linalg" in sys.modules
"""


def test_scipy_is_imported_for_those_who_need_it() -> None:
    subprocess.run([sys.executable, "-c", _CHECK], check=True, timeout=120)
