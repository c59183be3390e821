"""Gathering statistics: shared matrices, rounds, the cache, interruptions."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import merge_cli
from merge_cli.calibration.plan import plan_calibration
from merge_cli.calibration.run import calibrate
from merge_cli.calibration.store import Writer, find, making
from merge_cli.engine.journal import work_key
from merge_cli.errors import Interrupted, ResourceError, SourceError
from merge_cli.evaluation.fingerprints import source_identity
from tests.support.statistics_tiny import (
    CPU,
    cache,
    calibrated,
    merged,
    models,
    plan_of,
    refused,
    write_recipe,
)

__all__ = ["cache", "models"]
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.usefixtures("cache"),
]
METHODS = ("regmean", "fisher")


def silent(progress: Any) -> None:
    pass


def test_layers_that_see_the_same_input_share_a_matrix(models: Path) -> None:
    """q, k and v; gate and up: found by looking, as nothing in the code knows these names."""
    file = calibrated(write_recipe(models, "regmean")).files[0]
    arrays = {name.removeprefix("model.layers.0."): one.array for name, one in file.entries.items()}
    assert arrays["self_attn.q_proj.weight"] == arrays["self_attn.k_proj.weight"]
    assert arrays["self_attn.q_proj.weight"] == arrays["self_attn.v_proj.weight"]
    assert arrays["mlp.gate_proj.weight"] == arrays["mlp.up_proj.weight"]
    assert len(file.refs) == 2 * 4  # of two layers: attention, its output, gate and up, down
    assert len(file.entries) == 2 * 7


def test_rounds_change_nothing(models: Path) -> None:
    digests = []
    for rounds in (None, 3, 100):
        recipe = write_recipe(models, "regmean", statistics={"rounds": rounds})
        plan = plan_of(recipe)
        calibrated = calibrate(plan, CPU, silent).calibrated
        assert calibrated is not None
        digests.append(calibrated.digests)
        for part in plan_calibration(plan, "cpu", source_identity).parts:
            part.path.unlink()
    assert digests[0] == digests[1] == digests[2]


@pytest.mark.parametrize("method", METHODS)
def test_a_merge_with_other_settings_runs_no_model(
    models: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged(write_recipe(models, method), models / "one")
    monkeypatch.setattr("merge_cli.calibration.run.load", lambda *_, **__: pytest.fail("loaded"))
    other = {"alpha": 0.5} if method == "regmean" else {"normalize": "sum"}
    result = merge_cli.merge(write_recipe(models, method, parameters=other), models / "two",
                             options=CPU)  # fmt: skip
    assert all(one["from_cache"] for one in result.report["gathered"]["sources"])
    ours, theirs = (load_file(models / out / "model.safetensors") for out in ("one", "two"))
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("method", METHODS)
def test_the_resolved_recipe_gives_the_same_bytes(models: Path, method: str) -> None:
    """Also where nothing is in the cache any more."""
    (models / "deep").mkdir()
    result = merge_cli.merge(write_recipe(models, method), models / "deep" / "out", options=CPU)
    resolved = result.path / "merge_recipe.yaml"
    document = yaml.safe_load(resolved.read_text())
    assert document["models"][0]["data"] == {"files": ["../../a.jsonl"]}
    origin = document["metadata"]["gathered_from"]
    assert [one["model"] for one in origin] == ["a", "b"]
    assert [one["statistics"] for one in origin] == [
        one["digest"] for one in result.report["gathered"]["sources"]
    ]
    for part in plan_calibration(plan_of(resolved), "cpu", source_identity).parts:
        part.path.unlink()
    again = merge_cli.merge(resolved, models / "again", options=CPU)
    assert (again.path / "model.safetensors").read_bytes() == (
        result.path / "model.safetensors"
    ).read_bytes()
    assert again.report["recipe"]["text"].count("gathered_from") == 1
    (models / "a.jsonl").write_text('{"text": "other words"}\n')
    refused(resolved, "does not give the examples that this recipe.*a.jsonl", SourceError)


@pytest.mark.parametrize("method", METHODS)
def test_threads_blocks_and_shards_change_no_merge(models: Path, method: str) -> None:
    recipe = write_recipe(models, method)
    one = merge_cli.merge(recipe, models / "one", options=CPU)
    many = merge_cli.merge(recipe, models / "many", shard_size=20_000,
                           options=replace(CPU, threads=3))  # fmt: skip
    tensors: dict[str, torch.Tensor] = {}
    for file in many.path.glob("model-*.safetensors"):
        tensors |= load_file(file)
    assert len(list(many.path.glob("model-*.safetensors"))) > 1
    for name, tensor in load_file(one.path / "model.safetensors").items():
        assert torch.equal(tensor, tensors[name]), name


def test_fisher_is_the_same_compiled_and_in_torch(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(models, "fisher")
    compiled = merge_cli.merge(recipe, models / "compiled", options=CPU)
    monkeypatch.setattr("merge_cli.kernels.compiled.available", lambda: "switched off")
    plain = merge_cli.merge(recipe, models / "plain", options=CPU)
    assert plain.report["device"]["arithmetic"].startswith("torch")
    ours, theirs = (load_file(one.path / "model.safetensors") for one in (compiled, plain))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_order_of_rows_and_the_names_of_files_do_not_matter(models: Path) -> None:
    recipe = write_recipe(models, "regmean", statistics={"examples": None})
    first = calibrated(recipe).files[0]
    lines = (models / "a.jsonl").read_text().splitlines(keepends=True)
    (models / "other.jsonl").write_text("".join(reversed(lines)))
    recipe.write_text(recipe.read_text().replace("a.jsonl", "other.jsonl"))
    assert calibrated(recipe).files[0].path == first.path


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_was_stopped_goes_on_with_the_next_model(models: Path, method: str) -> None:
    recipe = write_recipe(models, method)

    def stop(progress: Any) -> None:
        if progress.stage == "gather" and progress.note.endswith("b"):
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="1 of 2 are done"):
        merge_cli.merge(recipe, models / "out", options=CPU, on_progress=stop)
    assert not (models / "out").exists()
    cache = Path(os.environ["MERGE_CLI_CACHE"]) / "statistics"
    assert not list(cache.rglob("*.partial"))
    seen: list[Any] = []
    result = merge_cli.merge(recipe, models / "out", options=CPU, on_progress=seen.append)
    notes = {progress.note for progress in seen if progress.stage == "gather"}
    assert notes == {"b", "b is loaded, to look at its examples"}
    assert [one["from_cache"] for one in result.report["gathered"]["sources"]] == [True, False]


def test_a_killed_process_leaves_nothing_that_is_believed(models: Path) -> None:
    """SIGKILL in the second model: the first one's file is there, and the second is made again."""
    recipe = write_recipe(models, "fisher")
    code = (
        "import os, signal, sys, merge_cli\n"
        "def show(p):\n"
        "    if p.stage == 'gather' and p.note.endswith('b'):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "options = merge_cli.MergeOptions(device='cpu', threads=1)\n"
        "merge_cli.merge(sys.argv[1], sys.argv[2], options=options, on_progress=show)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, recipe, models / "out"], timeout=300)
    assert done.returncode == -signal.SIGKILL
    parts = plan_calibration(plan_of(recipe), "cpu", source_identity).parts
    assert [part.cached is not None for part in parts] == [True, False]
    killed = merged(recipe, models / "out")
    for part in parts:
        part.path.unlink()
    whole = merged(recipe, models / "whole")
    assert all(torch.equal(killed[name], whole[name]) for name in whole)


def test_a_file_that_was_cut_off_is_made_again(models: Path) -> None:
    recipe = write_recipe(models, "regmean")
    file = calibrated(recipe).files[0]
    with file.path.open("r+b") as cut:
        cut.truncate(file.path.stat().st_size - 8)
    assert find(file.path) is None
    assert calibrated(recipe).files[0].digest == file.digest


def test_other_statistics_are_other_work(models: Path) -> None:
    """An interrupted merge is not continued with statistics of other examples."""
    keys = []
    for examples in (5, 4):
        plan = calibrate(
            plan_of(write_recipe(models, "fisher", statistics={"examples": examples})), CPU, silent
        )
        keys.append(work_key(plan, "cpu", True))
    assert keys[0] != keys[1]


def test_two_processes_do_not_make_one_file_twice(tmp_path: Path) -> None:
    place, waited = tmp_path / "f" / "x.safetensors", threading.Event()
    found: list[Path | None] = []

    def second() -> None:
        with making(place, waited.set) as path:
            found.append(path)

    thread = threading.Thread(target=second)
    with making(place, lambda: pytest.fail("nobody is there")) as path:
        assert path is not None
        thread.start()
        assert waited.wait(30)
        writer = Writer(path, "fisher", {"w": (2,)}, {})
        writer.put("w", np.ones(2, np.float32))
        writer.finish(place, {})
    thread.join(30)
    assert found == [None]
    assert not place.with_suffix(".partial").exists()


def test_a_full_disk_is_told_before_anything_is_run(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stat = os.statvfs(models)
    fields = [*stat]
    fields[4] = 1  # blocks that are available
    monkeypatch.setattr("os.statvfs", lambda _: os.statvfs_result(fields))
    with pytest.raises(ResourceError, match=r"statistics take .* MERGE_CLI_CACHE"):
        calibrated(write_recipe(models, "regmean"))
