"""The same bytes on every Python: `sum` over floats rounds once since 3.12, every time before."""

from __future__ import annotations

import functools
import importlib
import math
import operator
import pkgutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import merge_cli.kernels
import merge_cli.methods
from merge_cli.kernels import compiled
from tests.support.merges import digest
from tests.support.tiny import Family, merge

# Added up exactly and rounded, or rounded twice, they are two numbers, and two float32 numbers.
WEIGHTS = (0.4796384381823142, 0.46737200893631, 0.2575842246076027)
METHODS: dict[str, dict[str, Any]] = {
    "soup": {"base": False}, "task_arithmetic": {"normalize": True}, "ties": {"density": 0.5},
    "dare_linear": {"density": 0.5, "normalize": True}, "della_linear": {"density": 0.5},
    "breadcrumbs": {"density": 0.5, "normalize": True}, "multislerp": {"base": False},
    "karcher": {"base": False}, "model_stock": {}, "sce": {}, "nuslerp": {"base": False},
    "wudi": {"iterations": 3},
}  # fmt: skip


def exact(values: Iterable[Any], start: Any = 0) -> Any:
    listed = list(values)
    floats = type(start) is int and all(type(one) is float for one in listed)
    return math.fsum(listed) if floats and listed else functools.reduce(operator.add, listed, start)


def rounded(values: Iterable[Any], start: Any = 0) -> Any:
    return functools.reduce(operator.add, values, start)


def modules() -> list[Any]:
    found = []
    for package in (merge_cli.methods, merge_cli.kernels):
        for info in pkgutil.iter_modules(package.__path__):
            if info.name != "triton_kernels":
                found.append(importlib.import_module(f"{package.__name__}.{info.name}"))
    return found


def test_the_weights_tell() -> None:
    assert np.float32(exact(WEIGHTS)) != np.float32(rounded(WEIGHTS))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("arithmetic", ["compiled", "torch"])
def test_the_bytes_are_the_same(
    family: Family, tmp_path: Path, method: str, arithmetic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if arithmetic == "torch":
        monkeypatch.setattr(compiled, "available", lambda: "switched off")
    given = dict(METHODS[method])
    base = given.pop("base", True)
    count = 2 if method == "nuslerp" else 3
    weighted = method not in ("model_stock", "sce", "wudi")
    models = [{"weight": weight} if weighted else None for weight in WEIGHTS[:count]]
    recipe = family.recipe(method, base=base, models=models, parameters=given, dtype="float32")
    found = {}
    ways: dict[str, Callable[..., Any]] = {"exact": exact, "rounded": rounded}
    for name, way in ways.items():
        for module in modules():
            monkeypatch.setattr(module, "sum", way, raising=False)
        merge(recipe, tmp_path / name)
        found[name] = digest(tmp_path / name)
    assert found["exact"] == found["rounded"]
