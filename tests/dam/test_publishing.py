"""What training leaves: when it is stopped at its end, and what the files of it hold."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import merge_cli
from merge_cli.checkpoint.coefficients import open_coefficients
from merge_cli.dam import beginning, record
from merge_cli.dam import run as training
from merge_cli.dam.checkpoint import TrainingWorkspace, write_coefficients
from merge_cli.errors import Interrupted, NonFiniteError, ResourceError, UsageError
from merge_cli.options import MergeOptions, Progress
from tests.support.dam_tiny import config, write_data, write_models, write_recipe

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
OPTIONS = MergeOptions(device="cpu", threads=1)
QUICK: dict[str, Any] = {
    "max_steps": 1, "max_length": 24, "batch_size": 2, "top_k": 16, "evaluate_every": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_models(folder, config("llama"), names=("base", "a", "b"), change=0.3)
    write_data(folder, names=("a", "b"))
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGE_CLI_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def recipe_of(models: Path, **training: Any) -> Path:
    return write_recipe(models, {**QUICK, **training}, names=("a", "b"))


def test_ctrl_c_while_baselines_are_measured(models: Path, tmp_path: Path) -> None:
    recipe, out = recipe_of(models), tmp_path / "out"
    seen: list[Progress] = []

    def stop(progress: Progress) -> None:
        if progress.stage == "baselines":
            seen.append(progress)
            if len(seen) == 2:
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="without training"):
        merge_cli.merge(recipe, out, options=OPTIONS, on_progress=stop)
    assert len(seen) == 2
    assert not out.exists()
    assert merge_cli.merge(recipe, out, options=OPTIONS).report["training"]["steps"] == 1


def test_ctrl_c_after_the_last_step(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody asks any more whether to stop; what was finished stays."""
    recipe, out = recipe_of(models), tmp_path / "out"
    build = record.build_record

    def stop(*args: Any, **more: Any) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGTERM)
        return build(*args, **more)

    monkeypatch.setattr(training, "build_record", stop)
    with pytest.raises(Interrupted, match="stopped after training"):
        merge_cli.merge(recipe, out, options=OPTIONS)
    assert not out.exists()
    assert (tmp_path / "out.training" / "training.json").exists()
    assert merge_cli.merge(recipe, out, options=OPTIONS).report["training"]["steps"] == 1


def test_equal_coefficients_are_equal_bytes(tmp_path: Path) -> None:
    entries = {f"ä.{i}": torch.full((2, 1, 3 + i), 0.25 * i) for i in range(4)}
    found = set()
    for i in range(20):
        path = tmp_path / f"{i}.safetensors"
        write_coefficients(path, entries, "task_vector")
        found.add(path.read_bytes())
    assert len(found) == 1
    read = load_file(path)
    assert read.keys() == entries.keys()
    assert all(torch.equal(read[name], entries[name]) for name in entries)
    assert open_coefficients(path).form == "task_vector"


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_coefficients_that_are_not_finite_are_refused(tmp_path: Path, wrong: float) -> None:
    entries = {"fine": torch.ones(2, 1, 3), "odd": torch.tensor([[[1.0]], [[wrong]]])}
    path = tmp_path / "coefficients.safetensors"
    write_coefficients(path, entries, "soup")
    with pytest.raises(NonFiniteError, match="odd"):
        open_coefficients(path)
    with (
        TrainingWorkspace(tmp_path / "out", "key") as folder,
        pytest.raises(NonFiniteError, match="odd"),
    ):
        folder.finish(entries, "soup", {})
    assert folder.record() is None


def test_a_plan_keeps_its_shard_size(models: Path, tmp_path: Path) -> None:
    decided = merge_cli.plan(recipe_of(models), shard_size=8000)
    assert len(decided.shards) > 1
    out = merge_cli.merge(decided, tmp_path / "out", options=OPTIONS).path
    shards = [p for p in out.glob("*.safetensors") if p.name != "coefficients.safetensors"]
    assert len(shards) == len(decided.shards)


def killed_after_publishing(recipe: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """OUT is there, and so is OUT.training; the bytes of the report."""
    with monkeypatch.context() as patch:
        patch.setattr(TrainingWorkspace, "discard", lambda self: None)
        merge_cli.merge(recipe, out, options=OPTIONS)
    assert out.with_name("out.training").exists()
    return (out / "merge_report.json").read_bytes()


def test_killed_between_publishing_and_tidying_up(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = recipe_of(models), tmp_path / "out"
    report = killed_after_publishing(recipe, out, monkeypatch)
    result = merge_cli.merge(recipe, out, options=OPTIONS)
    assert result.report["training"]["steps"] == 1
    assert (out / "merge_report.json").read_bytes() == report
    assert not (tmp_path / "out.training").exists()


def test_what_was_left_does_not_block_other_work(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    killed_after_publishing(recipe_of(models), out, monkeypatch)
    other = recipe_of(models, max_steps=2)
    with pytest.raises(UsageError, match="exists already"):
        merge_cli.merge(other, out, options=OPTIONS)
    replacing = replace(OPTIONS, overwrite=True)
    assert merge_cli.merge(other, out, options=replacing).report["training"]["steps"] == 2
    assert not (tmp_path / "out.training").exists()


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_memory_that_runs_out_is_said_with_a_hint(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*args: Any, **more: Any) -> None:
        raise error

    monkeypatch.setattr(beginning, "assemble", fail)
    with pytest.raises(ResourceError, match="memory ran out.*batch_tokens.*residency"):
        merge_cli.merge(recipe_of(models), tmp_path / "out", options=OPTIONS)
