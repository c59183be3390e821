"""The loops that numba compiles: once for all workers of pytest, and before commands fork.

A fresh checkout has nothing compiled. Two workers that meet the same loop would both compile it,
and all of them take most of a minute.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from typing import TYPE_CHECKING

from merge_cli.kernels import compiled
from merge_cli.kernels.compiled.kernel import Kernel

if TYPE_CHECKING:
    import pytest


def kernels() -> list[Kernel]:
    """Every compiled loop, in one order."""
    listed: dict[int, Kernel] = {}
    for module in pkgutil.iter_modules(compiled.__path__, f"{compiled.__name__}."):
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, Kernel):
                listed[id(value)] = value
    return list(listed.values())


def pytest_sessionstart(session: pytest.Session) -> None:
    """Each of several workers compiles a share; the rest it loads, when it comes to that."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1 and not compiled.available():
        number = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
        for kernel in kernels()[number::workers]:
            kernel.load()
