"""The same command with an evaluation: what is there is measured, and not searched for again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import merge_cli
from merge_cli.errors import GateError, Interrupted, UsageError
from merge_cli.evaluation import quality_check
from merge_cli.options import MergeOptions
from tests.support.command import cli
from tests.support.evolve_tiny import OPTIONS, write_family, write_search

FEW = {"evaluations": 4, "population": 2}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MERGE_CLI_CACHE", str(tmp_path / "cache"))
    return write_family(tmp_path)


def merged(recipe: Path, folder: Path, options: MergeOptions = OPTIONS, **more: Any) -> Any:
    tasks = [folder / "a.test.jsonl"]
    return merge_cli.merge(recipe, folder / "out", options=options, evaluation=tasks, **more)


def test_a_gate_that_was_missed_is_measured_again(folder: Path) -> None:
    recipe = write_search(folder, FEW)
    with pytest.raises(GateError):
        merged(recipe, folder, gates=["a<0.01"])
    report = (folder / "out" / "merge_report.json").read_bytes()
    with pytest.raises(GateError):
        merged(recipe, folder, gates=["a<0.02"])
    again = merged(recipe, folder)
    assert again.made_before
    assert again.evaluation is not None
    assert (folder / "out" / "merge_report.json").read_bytes() == report


def test_stopped_while_it_was_evaluated(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write_search(folder, FEW)

    def stop(*_: Any, **__: Any) -> None:
        raise Interrupted("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(quality_check, "evaluate_source", stop)
        with pytest.raises(Interrupted) as caught:
            merged(recipe, folder)
    assert caught.value.hint == "The merge is complete. The same command evaluates it."
    assert merged(recipe, folder).made_before


@pytest.mark.parametrize("what", ["data", "search", "model", "seed", "statistics"])
def test_anything_else_is_refused(folder: Path, what: str) -> None:
    merged(write_search(folder, FEW), folder)
    recipe, options = write_search(folder, FEW), OPTIONS
    if what == "data":
        with (folder / "b.search.jsonl").open("a") as file:
            file.write(json.dumps({"text": "another row"}) + "\n")
    if what == "search":
        recipe = write_search(folder, {**FEW, "parameters": {"weight": {"min": 0.0, "max": 1.25}}})
    if what == "model":
        path = folder / "a" / "model.safetensors"
        weights = {name: tensor * 1.5 for name, tensor in load_file(path).items()}
        save_file(weights, path, {"format": "pt"})
    if what == "seed":
        recipe = write_search(folder, FEW, seed=4)
    if what == "statistics":
        options = replace(OPTIONS, statistics=False)
    with pytest.raises(UsageError, match="exists already"):
        merged(recipe, folder, options)


def test_the_command_says_that_nothing_was_merged(folder: Path) -> None:
    arguments = ("run", write_search(folder, FEW), folder / "out", "--threads", "1")
    data = ("--data", folder / "a.test.jsonl")
    assert cli(*arguments).returncode == 0
    again = cli(*arguments, *data)
    assert again.returncode == 0, again.stderr
    assert "is this very merge already" in again.stdout
    assert "merged" not in again.stdout
