"""Variants of one recipe in one pass: the bytes of the single merges."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import merge_cli
from merge_cli.engine import memory
from merge_cli.engine.journal import Journal
from merge_cli.engine.merge_stats import TensorStats
from merge_cli.errors import Interrupted, NonFiniteError, RecipeError, UsageError
from merge_cli.kernels import reduce
from merge_cli.options import MergeOptions
from merge_cli.planning import chunks as planning
from tests.support.command import cli, failed
from tests.support.merges import digest
from tests.support.tiny import Family, llama_config, llama_tensors, read_model, write_model

STEPS = range(1000, 7000, 1000)


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny tensors in many chunks and blocks."""
    for module in (planning, reduce):
        monkeypatch.setattr(module, "BLOCK_MULTIPLE", 64)
    monkeypatch.setattr(planning, "UNIT_BYTES", 4096)
    monkeypatch.setattr(memory, "_HOST_BLOCK", 64)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a training run with six checkpoints."""
    generator = torch.Generator().manual_seed(0)
    for step in STEPS:
        tensors = {k: v.bfloat16() for k, v in llama_tensors(generator).items()}
        write_model(tmp_path / "run" / f"step_{step}", tensors, llama_config())
    return tmp_path / "run"


def window(run: Path, **keys: Any) -> dict[str, Any]:
    checkpoints = {"from": str(run), "pattern": "step_{step}", "last": 5}
    return {"merge_method": "checkpoint_average", "checkpoints": checkpoints, **keys}


SWEEP: dict[str, Any] = {
    "mean": {"schedule": "constant"},
    "decay": {"schedule": "minus_sqrt"},
    "ema": {"schedule": {"ema": 0.8}, "checkpoints": {"last": 3}},
    "older": {"checkpoints": {"steps": [1000, 2000, 4000]}, "schedule": "cosine"},
}


def merged(recipe: Mapping[str, Any] | Path, out: Path, **options: Any) -> dict[str, Any]:
    return merge_cli.merge(recipe, out, options=MergeOptions(device="cpu", **options)).report


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("threads", [1, 3])
def test_windows_and_schedules(run: Path, tmp_path: Path, threads: int) -> None:
    report = merged(window(run, sweep=SWEEP), tmp_path / "out", threads=threads)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*SWEEP, "merge_report.json"}
    for name, keys in SWEEP.items():
        alone = window(run, schedule=keys["schedule"])
        over = keys.get("checkpoints", {})
        if over:
            alone["checkpoints"].pop("last")
            alone["checkpoints"] |= over
        merged(alone, tmp_path / name)
        assert digest(tmp_path / "out" / name) == digest(tmp_path / name)
        resolved = tmp_path / "out" / name / "merge_recipe.yaml"
        assert yaml.safe_load(resolved.read_text())["merge_method"] == "soup"
        merged(resolved, tmp_path / f"{name} again")
        assert digest(tmp_path / f"{name} again") == digest(tmp_path / name)
        config = (tmp_path / "out" / name / "config.json").read_text()
        assert config == (tmp_path / name / "config.json").read_text()
        assert report["sweep"][name]["recipe"]["text"] == resolved.read_text()
    checkpoints = sum(t.nbytes for step in STEPS for t in read_model(run / f"step_{step}").values())
    assert report["cost"]["bytes_read"] == checkpoints
    assert report["cost"]["stages"]["read"]["bytes"] == checkpoints  # each of the six once


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize(
    ("method", "variants"),
    [
        ("task_arithmetic", {"a": {"lambda": 0.3}, "b": {"lambda": 0.9}}),
        ("dare_ties", {"a": {"density": 0.3}, "b": {"density": 0.8, "lambda": 0.5}}),
        ("ties", {"a": {"density": 0.3}, "b": {"density": 0.8}, "c": {"semantics": "paper"}}),
        ("ties", {"a": {"density": 0.3, "trim": "model"}, "b": {"density": 0.6}}),
        ("della", {"a": {"density": 0.3, "epsilon": 0.1}, "b": {"density": 0.5}}),
    ],
)
def test_parameters(
    family: Family, tmp_path: Path, method: str, variants: dict[str, dict[str, Any]]
) -> None:
    """Also of methods with a base, random masks, and passes over tensors and models."""
    sweep = {name: {"parameters": parameters} for name, parameters in variants.items()}
    merged(family.recipe(method, sweep=sweep), tmp_path / "out")
    for name, parameters in variants.items():
        merged(family.recipe(method, parameters=parameters), tmp_path / f"alone {name}")
        assert digest(tmp_path / "out" / name) == digest(tmp_path / f"alone {name}")


@pytest.mark.usefixtures("small_steps")
def test_masks_belong_to_the_place_in_the_variant(family: Family, tmp_path: Path) -> None:
    """A variant with other models, in another order, has the masks of its own recipe."""
    models = {"a": ["a", "b"], "b": ["c", "b", "a"]}
    sweep = {name: {"models": listed} for name, listed in models.items()}
    shared = {"merge_method": "dare_ties", "base_model": "base", "parameters": {"density": 0.5}}
    merged(family.write({**shared, "models": ["a", "b"], "sweep": sweep}), tmp_path / "out")
    for name, listed in models.items():
        merged(family.write({**shared, "models": listed}), tmp_path / f"alone {name}")
        assert digest(tmp_path / "out" / name) == digest(tmp_path / f"alone {name}")


@pytest.mark.usefixtures("small_steps")
def test_what_is_interrupted_resumes(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = window(run, sweep=SWEEP), tmp_path / "out"
    merged(recipe, tmp_path / "whole")
    real, seen = Journal.record, 0

    def record(journal: Journal, chunks: Iterable[tuple[int, TensorStats]]) -> None:
        nonlocal seen
        done = list(chunks)
        real(journal, done)
        seen += len(done)
        if seen >= 9:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "record", record)
        with pytest.raises(Interrupted, match="The same command resumes"):
            merged(recipe, out)
    assert not out.exists()
    other = window(run, sweep={name: SWEEP[name] for name in ("mean", "decay")})
    with pytest.raises(UsageError, match="of another recipe"):
        merged(other, out)
    assert merged(recipe, out)["cost"]["resumed_bytes"] > 0
    for name in SWEEP:
        assert digest(out / name) == digest(tmp_path / "whole" / name)


def test_overwrite_and_what_is_no_part_of_a_sweep(run: Path, tmp_path: Path) -> None:
    recipe, out = window(run, sweep=SWEEP), tmp_path / "out"
    merged(recipe, out)
    with pytest.raises(UsageError, match="exists already"):
        merged(recipe, out)
    merged(recipe, out, overwrite=True)
    (out / "mean" / "notes.doc").write_text("mine")
    with pytest.raises(UsageError, match="holds mean/, which is no part of a model"):
        merged(recipe, out, overwrite=True)


def test_nan_is_named_with_its_model(run: Path, tmp_path: Path) -> None:
    tensors = read_model(run / "step_3000")
    tensors["model.norm.weight"][3] = torch.nan
    write_model(run / "step_3000", tensors, llama_config())
    recipe = window(run, sweep=SWEEP)
    with pytest.raises(NonFiniteError, match=r"element 3.*step_3000.*model.norm.weight"):
        merged(recipe, tmp_path / "out")
    report = merged(recipe, tmp_path / "out", allow_non_finite=True, fresh=True)
    counts = {
        name: sum(tensor["non_finite"] for tensor in one["tensors"])
        for name, one in report["sweep"].items()
    }
    assert counts == {"mean": 1, "decay": 1, "ema": 0, "older": 0}


def problems_of(text: str, tmp_path: Path) -> str:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    with pytest.raises(RecipeError) as caught:
        merge_cli.plan(recipe)
    return str(caught.value).replace(str(recipe), "recipe.yaml")


HEAD = "merge_method: checkpoint_average\ncheckpoints: {from: run, pattern: 'step_{step}'}\n"


@pytest.mark.usefixtures("run")
@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ("sweep: 3", "recipe.yaml:3:8: sweep: must be a mapping of two variants or more"),
        ("sweep: {a: {schedule: cosine}}", "recipe.yaml:3:8: sweep: must be a mapping of two"),
        (
            "sweep:\n  a: {schedule: cosin}\n  b: {}",
            "recipe.yaml:4:17: schedule: unknown schedule 'cosin'. Did you mean 'cosine'?",
        ),
        (
            "sweep:\n  a: {shedule: cosine}\n  b: {}",
            "recipe.yaml:4:7: sweep.a.shedule: cannot differ between variants",
        ),
        (
            "sweep:\n  a: {dtype: float32}\n  b: {}",
            "recipe.yaml:4:7: sweep.a.dtype: cannot differ between variants",
        ),
        ("sweep:\n  a/b: {}\n  b: {}", "recipe.yaml:4:3: sweep.a/b: cannot name a variant"),
        ("sweep:\n  a: 1\n  b: {}", "recipe.yaml:4:6: sweep.a: must be a mapping of"),
        (
            "sweep:\n  a: {checkpoints: {last: 40}}\n  b: {}",
            "recipe.yaml:4:27: checkpoints.last: there are only 6 checkpoints",
        ),
    ],
)
def test_problems_have_a_place(tmp_path: Path, sweep: str, message: str) -> None:
    assert message in problems_of(f"{HEAD}{sweep}\n", tmp_path)


def test_methods_that_look_at_data_are_refused(family: Family) -> None:
    data = family.folder / "data.jsonl"
    data.write_text('{"text": "one"}\n')
    models = [{"model": name, "data": str(data)} for name in ("a", "b")]
    sweep = {"a": {}, "b": {"parameters": {"normalize": "sum"}}}
    recipe = family.write({"merge_method": "fisher", "models": models, "sweep": sweep})
    with pytest.raises(RecipeError, match="merges with what was found out first"):
        merge_cli.plan(recipe)


def test_variants_of_other_shapes_are_refused(family: Family) -> None:
    tensors = {k: v for k, v in family.models[0].items() if ".3." not in k}
    write_model(family.folder / "short", tensors, llama_config(layers=3))
    sweep = {"long": {}, "short": {"models": ["short"]}}
    recipe = family.write({"merge_method": "soup", "models": ["a", "b"], "sweep": sweep})
    with pytest.raises(RecipeError, match=r"sweep\.short: its tensors are not those of the first"):
        merge_cli.plan(recipe)


def test_the_command_line(run: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(window(run, sweep=SWEEP), sort_keys=False))
    planned = cli("plan", recipe)
    assert planned.returncode == 0, planned.stderr
    for number, name in enumerate(SWEEP, start=1):
        assert f"Variant {number} of 4: {name}" in planned.stdout
    assert "All in one pass" in planned.stdout
    document = json.loads(cli("plan", recipe, "--json").stdout)
    assert [*document["sweep"]] == [*SWEEP]
    done = cli("run", recipe, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "merged 4 variants" in done.stdout
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "one"}\n')
    evaluated = cli("run", recipe, tmp_path / "new", "--data", data)
    failed(evaluated, 2, "a sweep has several results", "merge-cli compare")
    failed(cli("analyze", recipe), 2, "this recipe is a sweep")
    failed(cli("run", recipe, tmp_path / "new", "--tune", "lambda=0:1", "--tune-on", data), 2)
