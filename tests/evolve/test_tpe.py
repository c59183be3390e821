"""TPE learns more where it is told of each result before it proposes the next candidate."""

from __future__ import annotations

import importlib.util
from statistics import mean
from typing import Any

import pytest

from tests.support.paths import ROOT

pytest.importorskip("optuna")


@pytest.fixture(scope="module")
def quadratic() -> Any:
    path = ROOT / "scripts" / "experiments" / "quadratic.py"
    spec = importlib.util.spec_from_file_location("quadratic", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_one_by_one_is_better_than_generations_and_not_worse_than_optuna(quadratic: Any) -> None:
    """48 evaluations of a quadratic of 12 numbers; the figures are in docs/evolve.md."""
    seeds = range(8)
    one_by_one = mean(quadratic.ours(seed) for seed in seeds)
    assert one_by_one < mean(quadratic.ours(seed, workers=11) for seed in seeds)
    assert one_by_one < 1.1 * mean(quadratic.optuna_alone(seed) for seed in seeds)


def test_a_seed_proposes_the_same_for_each_number_of_workers(quadratic: Any) -> None:
    for workers in (1, 4):
        assert quadratic.ours(0, workers=workers) == quadratic.ours(0, workers=workers)
