"""What tests of regmean and fisher share: recipes with data, and the slow way to statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import merge_cli
from merge_cli.calibration.plan import plan_calibration
from merge_cli.calibration.run import calibrate
from merge_cli.checkpoint.statistics import CalibrationStatistics
from merge_cli.errors import RecipeError
from merge_cli.options import MergeOptions
from merge_cli.planning.plan import Plan
from merge_cli.planning.planner import load_recipe, make_plan
from tests.support import oracles
from tests.support.dam_tiny import config, write_data, write_models

NAMES = ("a", "b")
CPU = MergeOptions(device="cpu", threads=1)


def write_recipe(
    folder: Path, method: str, *, names: Sequence[str] = NAMES,
    statistics: Mapping[str, Any] | None = None, weight: float = 1.0, **keys: Any,
) -> Path:  # fmt: skip
    """METHOD.yaml beside the models and their data; `weight` is the last one's."""
    document: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": name, "data": f"{name}.jsonl"} for name in names],
        "statistics": {"examples": 5, "max_length": 16, **(statistics or {})},
        **keys,
    }
    document["models"][-1]["parameters"] = {"weight": weight}
    path = folder / f"{method}.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def plan_of(recipe: Path) -> Plan:
    return make_plan(load_recipe(recipe))


def merged(recipe: Path, out: Path) -> dict[str, torch.Tensor]:
    result = merge_cli.merge(recipe, out, options=CPU)
    return load_file(result.path / "model.safetensors")


def examples_of(recipe: Path) -> list[list[tuple[list[int], int]]]:
    """Token ids and the first that counts, of every example of every source."""
    parts = plan_calibration(plan_of(recipe), "cpu").parts
    return [[(list(one.ids), one.first) for one in part.examples.items] for part in parts]


def slow_net(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


def slow_grams(net: Any, examples: Sequence[tuple[list[int], int]]) -> dict[str, np.ndarray]:
    """Module -> matrix, from inputs that are caught one example at a time."""
    caught: dict[str, list[np.ndarray]] = {}

    def catch(name: str) -> Any:
        def hook(module: Any, args: Any, result: Any) -> None:
            rows = args[0].reshape(-1, args[0].shape[-1])
            caught.setdefault(name, []).extend(row.double().numpy() for row in rows)

        return hook

    for name, module in net.named_modules():
        if isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D":
            module.register_forward_hook(catch(name))
    with torch.no_grad():
        for ids, _ in examples:
            net(torch.tensor([ids]))
    return {name: oracles.gram(rows) for name, rows in caught.items()}


def slow_importances(net: Any, examples: Sequence[tuple[list[int], int]]) -> dict[str, np.ndarray]:
    """Parameter -> importance, from one gradient for each example."""
    names, parameters = zip(*net.named_parameters(), strict=True)
    rows: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for ids, first in examples:
        logp = net(torch.tensor([ids])).logits[0].log_softmax(-1)
        likelihood = sum(logp[i - 1, ids[i]] for i in range(first, len(ids)))
        for name, g in zip(names, torch.autograd.grad(likelihood, parameters), strict=True):
            rows[name].append(g.numpy())
    return {name: oracles.importance(found) for name, found in rows.items()}


def calibrated(recipe: Path) -> CalibrationStatistics:
    """What a recipe's sources were looked at for."""
    found = calibrate(plan_of(recipe), CPU, lambda progress: None).calibrated
    assert found is not None
    return found


def refused(recipe: Path, match: str, kind: type[Exception] = RecipeError) -> None:
    with pytest.raises(kind, match=match):
        calibrated(recipe)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A base and sources a, b, c with their data."""
    write_models(tmp_path, config("llama"), change=0.2)
    write_data(tmp_path)
    return tmp_path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    place = tmp_path / "cache"
    monkeypatch.setenv("MERGE_CLI_CACHE", str(place))
    return place
