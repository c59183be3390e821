"""The scripts that measure DAM still run, and the experiment chooses what it says it chooses."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import ROOT


@pytest.fixture(scope="module")
def experiment() -> Any:
    place = ROOT / "scripts" / "experiments" / "dam.py"
    spec = importlib.util.spec_from_file_location("experiment_dam", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def scores(*values: float) -> dict[str, float]:
    names = ("japanese", "math", "code")
    kl = {f"kl {name}": value for name, value in zip(names, values, strict=True)}
    return {**kl, **{f"loss {name}": 2 * value for name, value in zip(names, values, strict=True)}}


def test_settings_are_chosen_on_validation_and_reported_on_test(experiment: Any) -> None:
    results: dict[str, Any] = {f"test {name}": scores(1, 1, 1) for name in
                               ("base", "japanese", "math", "code")}  # fmt: skip
    for family, grid in experiment.GRIDS.items():
        for number, setting in enumerate(grid):
            label = experiment.label_of(setting)
            good = 0.1 if number == len(grid) - 1 else 0.5
            results[f"val {family}: {label}"] = {"setting": setting, **scores(good, good, good)}
            # On test the others would look better: they must not be taken.
            results[f"test {family}: {label} seed 0"] = {
                "setting": setting, **scores(0.9 - good, 0.3, 0.3),
            }  # fmt: skip
    last = experiment.GRIDS["TIES"][-1]
    assert experiment.best_setting(results, "TIES") == last
    rows = dict(experiment.rows(results))
    assert rows["TIES"][0]["setting"] == last
    assert rows["TIES"][0]["kl japanese"] == pytest.approx(0.8)
    shown = experiment.table(results)
    assert "| TIES (density 0.5, lambda 1) | 1 | 0.8000 |" in shown


def test_the_recipes_of_the_experiment_are_recipes(experiment: Any, tmp_path: Path) -> None:
    import yaml

    import merge_cli
    from merge_cli.planning.preparation import preparations_of

    for name, dials in experiment.LEARNED.items():
        path = tmp_path / "r.yaml"
        path.write_text(yaml.safe_dump(experiment.learned_recipe(dials, 1)))
        assert preparations_of(merge_cli.plan(path)), name
    for grid in experiment.GRIDS.values():
        path.write_text(yaml.safe_dump(experiment.static_recipe(grid[0])))
        assert not preparations_of(merge_cli.plan(path))


@pytest.mark.slow
@pytest.mark.parametrize("what", ["speed", "memory"])
def test_the_benchmark_runs(what: str) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "bench_dam.py"), what, "--shape", "tiny",
               "--rows", "1", "--length", "32", "--rounds", "1"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=200)
    assert "| disk |" in done.stdout
    assert "| host |" in done.stdout
