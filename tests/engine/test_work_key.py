"""What a stage is known by before its preparation: the same in every process, whole, no more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from merge_cli.engine.journal import work_key
from merge_cli.planning.planner import load_recipe, make_plan
from tests.support.dam_tiny import llamas_with_data

SEARCH = {"method": "ties", "parameters": {"weight": {"min": 0, "max": 1, "tied": True}}}
RECIPES: dict[str, dict[str, Any]] = {
    "dam": {"training": {"max_steps": 3, "granularity": {"mlp": "row", "*": "column"}}},
    "auto": {"budget": {"tokens": 1000}, "statistics": {"examples": 4}},
    "fisher": {"statistics": {"examples": 4}},
    "evolutionary": {
        "search": {**SEARCH, "evaluations": 8, "population": 4},
        "objective": [{"task": "loss", "data": "c.jsonl"}],
    },
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llamas_with_data(tmp_path_factory.mktemp("models"))


def write(models: Path, method: str, **keys: Any) -> Path:
    sources = [{"model": name, "data": f"{name}.jsonl"} for name in ("a", "b")]
    common = {"merge_method": method, "base_model": "base", "models": sources}
    path = models / f"{method}.yaml"
    path.write_text(yaml.safe_dump({**common, **RECIPES[method], **keys}))
    return path


def key(models: Path, method: str, **keys: Any) -> str:
    return work_key(make_plan(load_recipe(write(models, method, **keys))))


_CODE = """
import sys
from merge_cli.engine.journal import work_key
from merge_cli.planning.planner import load_recipe, make_plan
print(*(work_key(make_plan(load_recipe(path))) for path in sys.argv[1:]))
"""


def test_the_same_in_every_process(models: Path) -> None:
    """Sets of words have another order in each."""
    recipes = [str(write(models, method)) for method in RECIPES]
    keys = set()
    for seed in ("1", "2", "3"):
        done = subprocess.run(
            [sys.executable, "-c", _CODE, *recipes],
            env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        keys.add(done.stdout)
    assert len(keys) == 1


@pytest.mark.parametrize(
    ("method", "same"),
    [("dam", {"training": {**RECIPES["dam"]["training"], "residency": "disk"}}),
     ("evolutionary", {"search": {**RECIPES["evolutionary"]["search"], "workers": 2}})],
)  # fmt: skip
def test_what_changes_no_result_is_not_in_it(
    models: Path, method: str, same: dict[str, Any]
) -> None:
    """So that interrupted work goes on."""
    assert key(models, method) == key(models, method, **same)


@pytest.mark.parametrize(
    ("method", "other"),
    [("dam", {"training": {"max_steps": 4}}), ("auto", {"budget": {"tokens": 2000}}),
     ("auto", {"methods": ["soup"]}), ("fisher", {"statistics": {"examples": 5}}),
     ("evolutionary", {"search": {**SEARCH, "evaluations": 9, "population": 4}}),
     ("evolutionary", {"objective": [{"task": "loss", "data": "b.jsonl"}]})],
)  # fmt: skip
def test_what_it_goes_by_is_in_it(models: Path, method: str, other: dict[str, Any]) -> None:
    assert key(models, method) != key(models, method, **other)


@pytest.mark.parametrize("method", RECIPES)
def test_the_content_of_every_file_is_in_it(models: Path, method: str) -> None:
    file = models / ("c.jsonl" if method == "evolutionary" else "a.jsonl")
    text, before = file.read_text(), key(models, method)
    try:
        file.write_text(text.replace("0", "9", 1))
        assert key(models, method) != before
    finally:
        file.write_text(text)
