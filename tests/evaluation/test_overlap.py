"""An evaluation on rows that the recipe was made with is told, whatever the files are called."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from merge_cli.evaluation.quality_check import overlap_notes
from merge_cli.evaluation.run import as_spec
from merge_cli.planning.planner import load_recipe, make_plan
from tests.support.dam_tiny import config, write_models, write_recipe

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def rows(path: Path, texts: list[str]) -> Path:
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return path


def test_rows_of_training_in_an_evaluation(tmp_path: Path) -> None:
    write_models(tmp_path, config(), names=("base", "a", "b"))
    for name in ("a", "b"):
        rows(tmp_path / f"{name}.jsonl", [f"{name} {i}" for i in range(6)])
    recipe = load_recipe(write_recipe(tmp_path, names=("a", "b")))
    own = as_spec([rows(tmp_path / "own.jsonl", ["something", "else"])])
    shared = as_spec([rows(tmp_path / "shared.jsonl", ["b  3", "a 1 ", "else"])])
    plan = make_plan(recipe)
    assert overlap_notes(plan, own) == []
    (note,) = overlap_notes(plan, shared)
    assert note.startswith("2 of 3 rows of the evaluation shared are among those")


def test_rows_of_a_search_in_an_evaluation(tmp_path: Path) -> None:
    write_models(tmp_path, config(), names=("base", "a", "b"))
    for name in ("search", "test"):
        rows(tmp_path / f"{name}.jsonl", [f"{name} {i}" for i in range(6)])
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "merge_method: greedy_soup\nmodels: [{model: a}, {model: b}]\nobjective:\n"
        "  - {task: loss, data: search.jsonl}\n  - {task: loss, data: test.jsonl, split: test}\n"
    )
    recipe = load_recipe(path)
    (note,) = overlap_notes(
        make_plan(recipe), as_spec([tmp_path / "search.jsonl", tmp_path / "test.jsonl"])
    )
    assert note.startswith("6 of 6 rows of the evaluation search ")
