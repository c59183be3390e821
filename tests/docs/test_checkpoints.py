"""What docs/checkpoints.md shows runs as it stands: the recipe, and the code for training loops."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import merge_cli
from merge_cli.recipe.schedule import CURVES
from tests.support.documents import blocks
from tests.support.paths import ROOT
from tests.support.tiny import llama_config, llama_tensors, read_model, write_model

PAGE = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
DISK, DICTS, LOOP, CALLBACK, TRAINER = blocks("python", PAGE)


def run(code: str, **names: Any) -> dict[str, Any]:
    scope = {"merge_cli": merge_cli, "torch": torch, **names}
    exec(compile(code, "docs/checkpoints.md", "exec"), scope)
    return scope


def write_run(folder: Path, names: list[str]) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    written = []
    for name in names:
        tensors = {key: t.bfloat16() for key, t in llama_tensors(generator, layers=1).items()}
        write_model(folder / name, tensors, llama_config(layers=1))
        written.append(tensors)
    return written


def test_the_recipe(tmp_path: Path) -> None:
    steps = range(10000, 50001, 2000)
    write_run(tmp_path / "runs" / "pretrain", [f"step_{step}" for step in steps])
    recipe, *_ = blocks("yaml", PAGE)
    (tmp_path / "recipe.yaml").write_text(recipe)
    plan = merge_cli.plan(tmp_path / "recipe.yaml")
    assert len(plan.operands) == len(steps)
    assert "10000 21.8 %" in plan.notes[1]
    assert math.sqrt(1 / 21) == pytest.approx(0.218, abs=5e-4)


def test_the_sweeps(tmp_path: Path) -> None:
    _, sweep, ties = blocks("yaml", PAGE)
    write_run(tmp_path / "runs" / "pretrain", [f"step_{step}" for step in range(16)])
    (tmp_path / "recipe.yaml").write_text(sweep)
    merge_cli.merge(tmp_path / "recipe.yaml", tmp_path / "out")
    folders = {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()}
    assert folders == {"mean", "decay", "newest"}
    write_run(tmp_path / "org", ["base", "math", "code"])
    (tmp_path / "ties.yaml").write_text(ties)
    assert [*merge_cli.plan(tmp_path / "ties.yaml").variants] == ["sparse", "dense"]


def test_every_schedule_is_in_the_table() -> None:
    for name in (*CURVES, "constant"):
        assert f"\n| `{name}`" in PAGE
    assert "\n| `{ema: d}`" in PAGE
    assert "\n| `{weights: [...]}`" in PAGE


def test_a_running_average_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = [f"checkpoint-{step}" for step in (1000, 2000, 3000)]
    written = write_run(tmp_path / "runs" / "pretrain", names)
    run(DISK)
    expected = merge_cli.merge_state_dicts(written)
    average = read_model(tmp_path / "runs" / "average")
    assert all(torch.equal(average[name], expected[name]) for name in expected)


def test_dicts() -> None:
    scope = run(DICTS)
    runs = [tensors["weight"].double() for tensors in scope["runs"]]
    mean = (runs[0] + runs[1] + runs[2]) / 3
    torch.testing.assert_close(scope["mean"]["weight"].double(), mean, rtol=1e-6, atol=1e-6)
    assert scope["merged"]["weight"].shape == (4, 4)
    assert not torch.equal(scope["decayed"]["weight"], scope["mean"]["weight"])


def test_a_plain_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = [torch.randn(8, 3) for _ in range(20)]
    scope = run(LOOP, model=model, optimizer=optimizer, batches=batches)
    assert scope["average"].weights == [1.0, 1.0]
    loaded = merge_cli.RunningAverage.load("average.safetensors").average()
    assert all(torch.equal(loaded[name], t) for name, t in model.state_dict().items())


def test_a_callback_of_the_trainer(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**llama_config(layers=1) | {"dtype": "float32"})
    model = transformers.LlamaForCausalLM(config)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, save_steps=2, per_device_train_batch_size=2,
        report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    rows = [{"input_ids": [1, i, i + 1, 2], "labels": [1, i, i + 1, 2]} for i in range(3, 11)]
    run(CALLBACK + TRAINER, model=model, arguments=arguments, rows=rows)
    saved = [read_model(tmp_path / f"checkpoint-{step}") for step in (2, 4)]
    expected = merge_cli.merge_state_dicts(saved)
    result = read_model(tmp_path)
    assert all(torch.equal(result[name], expected[name]) for name in expected)
    # The folder that the Trainer has left is a run whose window can be averaged.
    document = f"merge_method: checkpoint_average\ncheckpoints: {{from: {tmp_path}}}\n"
    recipe = merge_cli.load_recipe(tmp_path / "recipe.yaml", text=document)
    merge_cli.merge(recipe, tmp_path / "out")
    merged = read_model(tmp_path / "out")
    assert all(torch.equal(merged[name], expected[name]) for name in expected)
    assert not list((tmp_path / "out").glob("*.pt")) + list((tmp_path / "out").glob("*.bin"))
