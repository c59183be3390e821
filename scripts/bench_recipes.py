"""What is measured: each method's recipe, and how many times the floor it may take."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Method:
    """One row of the benchmark.

    Attributes:
        target: the goal for our time over the floor's.
        merge_method: our name of it.
        mergekit: mergekit's name; None where it has no such method.
        base: whether there is a base model.
        models: how many of the fine-tunes are used; None for all.
        each: parameters of every model.
        parameters: parameters of the merge.
    """

    target: float
    merge_method: str
    mergekit: str | None
    base: bool = True
    models: int | None = None
    each: dict[str, Any] = field(default_factory=dict)
    parameters: dict[str, Any] = field(default_factory=dict)


_HALF = {"weight": 1.0, "density": 0.5}
METHODS = {
    "soup": Method(1.1, "soup", "linear", base=False, each={"weight": 1.0}),
    "task_arithmetic": Method(1.3, "task_arithmetic", "task_arithmetic", each={"weight": 0.4}),
    "ties": Method(1.6, "ties", "ties", each=_HALF, parameters={"normalize": True}),
    "ties_model": Method(
        2.2, "ties", None, each=_HALF, parameters={"normalize": True, "trim": "model"}
    ),
    "dare": Method(1.3, "dare", "dare_linear", each=_HALF),
    "dare_ties": Method(1.3, "dare_ties", "dare_ties", each=_HALF),
    "slerp": Method(1.1, "slerp", "slerp", models=1, parameters={"t": 0.4}),
    "passthrough": Method(1.1, "passthrough", "passthrough", base=False, models=1),
}


def models_of(family: Path, method: Method) -> list[Path]:
    """The folders that the merge reads, the base first where there is one."""
    fine_tunes = sorted(family.glob("model[0-9]*"), key=lambda path: int(path.name[5:]))
    if not fine_tunes:
        raise SystemExit(f"{family} holds no fine-tunes: base, model0, model1, ... are expected")
    return [*([family / "base"] if method.base else []), *fine_tunes[: method.models]]


def weight_files(models: list[Path]) -> list[Path]:
    return [file for model in models for file in sorted(model.glob("*.safetensors"))]


def write_recipe(path: Path, family: Path, method: Method, *, mergekit: bool = False) -> None:
    """Everything explicit, paths absolute (mergekit takes relative ones for Hub ids)."""
    used = models_of(family.absolute(), method)
    # slerp walks from one of its models to another; elsewhere the base is not one of the models.
    sources = used[1:] if method.base and method.merge_method != "slerp" else used
    recipe: dict[str, Any] = {
        "merge_method": method.mergekit if mergekit else method.merge_method,
        "models": [
            {"model": str(model), **({"parameters": method.each} if method.each else {})}
            for model in sources
        ],
        "dtype": "bfloat16",
    }
    if method.base:
        recipe["base_model"] = str(used[0])
    if method.parameters:
        recipe["parameters"] = method.parameters
    path.write_text(json.dumps(recipe, indent=2) + "\n")  # JSON is YAML
