"""A running average on disk: the bytes of the soup of all checkpoints, without reading old ones."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
import torch
import yaml

import merge_cli
from merge_cli.engine.device import choose_device
from merge_cli.engine.memory import estimated_peak, worker_memory
from merge_cli.errors import SourceError, UsageError
from merge_cli.options import MergeOptions
from tests.support.tiny import llama_config, llama_tensors, write_model


@pytest.fixture
def run(tmp_path: Path) -> list[Path]:
    """Five checkpoints of a run."""
    return write_run(tmp_path / "run", 5)


def write_run(folder: Path, count: int) -> list[Path]:
    generator = torch.Generator().manual_seed(6)
    folders = []
    for i in range(count):
        tensors = {n: t.bfloat16() for n, t in llama_tensors(generator, layers=1).items()}
        folders.append(write_model(folder / f"checkpoint-{i}", tensors, llama_config(layers=1)))
    return folders


def soup(folder: Path, models: list[Path], weights: list[float] | None = None) -> str:
    """The SHA-256 of the soup of all."""
    listed = [
        {"model": str(model), "parameters": {"weight": weight}}
        for model, weight in zip(models, weights or [1.0] * len(models), strict=True)
    ]
    text = yaml.safe_dump({"merge_method": "soup", "models": listed})
    recipe = merge_cli.load_recipe(folder / "soup.yaml", text=text)
    merge_cli.merge(recipe, folder / "soup", options=MergeOptions(overwrite=True))
    return digest(folder / "soup")


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_old_checkpoints_may_be_deleted(tmp_path: Path, run: list[Path]) -> None:
    expected = [soup(tmp_path, run[:2]), soup(tmp_path, run[:3]), soup(tmp_path, run)]
    out, sums = tmp_path / "average", tmp_path / "average.average"
    merge_cli.add_checkpoints(out, run[:2])
    assert digest(out) == expected[0]
    for old in run[:2]:
        shutil.rmtree(old)
    merge_cli.add_checkpoints(out, [run[2]])
    assert digest(out) == expected[1]
    shutil.rmtree(run[2])
    result = merge_cli.add_checkpoints(out, run[3:])
    assert digest(out) == expected[2]
    assert result.path == out.resolve()
    assert (out / "config.json").read_bytes() == (run[4] / "config.json").read_bytes()
    assert [path.name for path in sums.iterdir() if path.is_dir()] == ["sum-5"]


def test_weights(tmp_path: Path, run: list[Path]) -> None:
    weights = [0.3, 0.1, 0.7, 1.9, 0.25]
    merge_cli.add_checkpoints(tmp_path / "average", run[:3], weights[:3])
    merge_cli.add_checkpoints(tmp_path / "average", run[3:], weights[3:])
    assert digest(tmp_path / "average") == soup(tmp_path, run, weights)


def test_the_same_call_adds_nothing_twice(tmp_path: Path, run: list[Path]) -> None:
    out = tmp_path / "average"
    merge_cli.add_checkpoints(out, run[:2])
    before = digest(out)
    shutil.rmtree(out)  # as if it had been interrupted between the sum and the mean
    merge_cli.add_checkpoints(out, run[:2])
    merge_cli.add_checkpoints(out, run[:2])
    assert digest(out) == before
    with pytest.raises(UsageError, match="in this average already"):
        merge_cli.add_checkpoints(out, [run[0], run[2]])
    assert digest(out) == before


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path, run: list[Path]) -> None:
    out = tmp_path / "average"
    write_model(out, {"w": torch.ones(2)})
    for _ in range(2):
        with pytest.raises(UsageError, match="no average of this kind"):
            merge_cli.add_checkpoints(out, run[:2])
    assert not (tmp_path / "average.average").exists()


def test_what_is_refused(tmp_path: Path, run: list[Path]) -> None:
    add, out = merge_cli.add_checkpoints, tmp_path / "average"
    with pytest.raises(UsageError, match="no checkpoints"):
        add(out, [])
    with pytest.raises(UsageError, match="listed twice"):
        add(out, [run[0], run[0]])
    with pytest.raises(UsageError, match="1 weights for 2"):
        add(out, run[:2], [1])
    with pytest.raises(UsageError, match="finite"):
        add(out, run[:1], [float("nan")])
    with pytest.raises(UsageError, match="sum to 0"):
        add(out, run[:2], [1, -1])
    with pytest.raises(SourceError, match="no such folder"):
        add(out, [tmp_path / "nothing"])
    wide = write_model(tmp_path / "wide", {"w": torch.ones(2, dtype=torch.float64)})
    with pytest.raises(SourceError, match="float64"):
        add(out, [wide])
    mixed = {"w": torch.ones(2), "v": torch.ones(2).bfloat16()}
    write_model(tmp_path / "mixed", mixed)
    with pytest.raises(UsageError, match="bfloat16 and float32"):
        add(out, [tmp_path / "mixed"])
    assert not out.exists()
    add(out, [tmp_path / "mixed"], dtype="float32")
    assert out.is_dir()


def test_a_sum_that_does_not_say_of_what(tmp_path: Path, run: list[Path]) -> None:
    out = tmp_path / "average"
    merge_cli.add_checkpoints(out, run[:2])
    recipe = tmp_path / "average.average" / "sum-2" / "merge_recipe.yaml"
    recipe.write_text(recipe.read_text().replace("running_average", "something"))
    with pytest.raises(UsageError, match="is no running average"):
        merge_cli.add_checkpoints(out, run[2:])


def test_memory_does_not_grow_with_the_number_of_checkpoints(tmp_path: Path) -> None:
    write_run(tmp_path, 40)
    text = "merge_method: checkpoint_average\ncheckpoints: {from: ., last: %d}\n"
    device, options = choose_device("cpu"), MergeOptions(threads=8)
    plans = [
        merge_cli.plan(merge_cli.load_recipe(tmp_path / "recipe.yaml", text=text % count))
        for count in (16, 40)
    ]
    few, many = (worker_memory(plan, device, options) for plan in plans)
    assert (few.workers, many.workers) == (8, 8)
    assert many.bytes < few.bytes
    assert estimated_peak(plans[1], device, options) < 500_000_000
