"""Tiny models to search on, and the few lines that search and read the result."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

import merge_cli
from merge_cli.evolve.run import SearchResult, search
from merge_cli.options import MergeOptions
from merge_cli.planning.planner import load_recipe, make_plan
from tests.support.dam_tiny import config, write_models

SEARCH: dict[str, Any] = {
    "method": "task_arithmetic",
    "parameters": {"weight": {"min": 0.0, "max": 1.5}},
    "evaluations": 12,
    "population": 4,
}
OPTIONS = MergeOptions(device="cpu", threads=1)


def write_family(folder: Path, dtype: torch.dtype = torch.bfloat16, layers: int = 2) -> Path:
    """base, a, b and c, and data of three splits: NAME.SPLIT.jsonl."""
    write_models(folder, config(num_hidden_layers=layers), dtype=dtype)
    for name in ("a", "b"):
        for number, split in enumerate(("search", "validation", "test")):
            with (folder / f"{name}.{split}.jsonl").open("w") as file:
                for i in range(4):
                    row = {"text": f"{name} {split} {i} " + "xyz"[(i + number) % 3] * (4 + i)}
                    file.write(json.dumps(row) + "\n")
    return folder


def write_search(
    folder: Path, changes: Mapping[str, Any] | None = None, *,
    method: str = "evolutionary", splits: Sequence[str] = ("search", "validation", "test"),
    objective: Any = None, models: Sequence[Any] = ("a", "b"), **keys: Any,
) -> Path:  # fmt: skip
    """recipe.yaml beside the family; `changes` to SEARCH, None removes a key."""
    section = {k: v for k, v in {**SEARCH, **(changes or {})}.items() if v is not None}
    tasks = [
        {"task": "loss", "data": f"{name}.{split}.jsonl", "split": split}
        for split in splits for name in ("a", "b")
    ]  # fmt: skip
    document = {
        "merge_method": method,
        "base_model": "base",
        "models": [one if isinstance(one, dict) else {"model": one} for one in models],
        **({"search": section} if method == "evolutionary" or changes else {}),
        "objective": tasks if objective is None else objective,
        "dtype": "bfloat16",
        "seed": 3,
        **keys,
    }
    if method == "greedy_soup" and not changes:
        document.pop("search", None)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def run_search(recipe: Path, out: Path, **options: Any) -> SearchResult:
    """Search alone; nothing is merged."""
    plan = make_plan(load_recipe(recipe))
    return search(plan, out, replace(OPTIONS, **options), on_progress=lambda progress: None)


def merge(recipe: Path, out: Path) -> merge_cli.MergeResult:
    """The whole job."""
    return merge_cli.merge(recipe, out, options=OPTIONS)


def journal(path: Path) -> list[dict[str, Any]]:
    """A journal's lines without what takes another time each time."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    times = ("seconds", "crc")
    return [{k: v for k, v in line.items() if k not in times} for line in lines]
