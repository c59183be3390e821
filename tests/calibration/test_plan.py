"""Recipes of regmean and fisher: what is refused, what the plan shows, stages, comparisons."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import merge_cli
from merge_cli.calibration.plan import plan_calibration
from merge_cli.cli import app
from merge_cli.engine.journal import work_key
from merge_cli.errors import MismatchError, NonFiniteError, SourceError
from merge_cli.planning.planner import load_recipe
from tests.support.dam_tiny import write_data, write_experts
from tests.support.statistics_tiny import (
    CPU,
    cache,
    calibrated,
    examples_of,
    models,
    plan_of,
    refused,
    slow_importances,
    slow_net,
    write_recipe,
)  # fmt: skip

__all__ = ["cache", "models"]
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.usefixtures("cache"),
]
METHODS = ("regmean", "fisher")


def test_experts_that_are_stored_one_by_one_are_the_mean_in_regmean(tmp_path: Path) -> None:
    """transformers loads them stacked, in a module that is no linear layer."""
    write_experts(tmp_path, "mixtral", dtype=torch.float32)
    write_data(tmp_path)
    recipe = write_recipe(tmp_path, "regmean")
    decided = plan_calibration(plan_of(recipe), "cpu")
    result = merge_cli.merge(recipe, tmp_path / "out", options=CPU)
    assert result.report["gathered"]["means"] == decided.means >= 2 * 4 * 3
    found = load_file(result.path / "model.safetensors")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "b"))
    name = "model.layers.0.block_sparse_moe.experts.2.w1.weight"
    torch.testing.assert_close(found[name], (one[name] + two[name]) / 2)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_stacked_experts_have_importances_of_their_own(tmp_path: Path, kind: str) -> None:
    write_experts(tmp_path, kind, dtype=torch.float32)
    write_data(tmp_path)
    recipe = write_recipe(tmp_path, "fisher")
    plan = plan_of(recipe)
    assert plan_calibration(plan, "cpu").means == 0
    (file, _), examples = calibrated(recipe).files, examples_of(recipe)[0]
    net = slow_net(tmp_path / "a")
    net.set_experts_implementation("eager")  # the grouped product has no float64
    slow = slow_importances(net, examples)
    words = {"mixtral": ("block_sparse_moe", "w1", "w3", "w2"),
             "qwen3_moe": ("mlp", "gate_proj", "up_proj", "down_proj")}[kind]  # fmt: skip
    for layer in range(2):
        start = f"model.layers.{layer}."
        gate_up = slow[f"{start}mlp.experts.gate_up_proj"]
        down = slow[f"{start}mlp.experts.down_proj"]
        for expert in range(4):
            gate, up = np.split(gate_up[expert], 2)
            for word, wanted in zip(words[1:], (gate, up, down[expert]), strict=True):
                name = f"{start}{words[0]}.experts.{expert}.{word}.weight"
                found = file.of(name)
                assert found is not None
                whole = found.whole(torch.zeros(wanted.shape)).numpy()
                np.testing.assert_allclose(whole, wanted, rtol=1e-3, atol=1e-9)
    report = merge_cli.merge(recipe, tmp_path / "out", options=CPU).report
    assert report["gathered"]["means"] == 0


def test_what_is_refused(models: Path) -> None:
    recipe = write_recipe(models, "regmean")
    text = recipe.read_text()
    for before, after, match in (
        ("examples:", "exampels:", r"statistics.exampels.*Did you mean 'examples'"),
        ("examples: 5", "examples: 0", r"must be at least 1 \(got 0\)"),
        ("examples: 5", "targets: sampled", "statistics.targets: has no effect in regmean"),
        ("  data: b.jsonl\n", "", "has no `data:`, and regmean looks at examples of every model"),
        ("b.jsonl", "c_.jsonl", "no such file: c_.jsonl"),
        ("regmean", "soup", "soup looks at no examples"),
        ("statistics:", "training: {}\nstatistics:", "regmean learns nothing"),
        ("statistics:", "output: adapter\nstatistics:", "regmean runs models, and adapters"),
        ("weight: 1.0", "weight: -1.0", "must be a number at least 0"),
    ):
        recipe.write_text(text.replace(before, after))
        refused(recipe, match)
    fisher = write_recipe(models, "fisher", statistics={"rounds": 2})
    refused(fisher, "statistics.rounds: has no effect in fisher")
    slices = {"models": None, "slices": [{"sources": [{"model": "a", "layer_range": [0, 1]}]}]}
    document = {**yaml.safe_load(text), **slices}
    document.pop("models")
    recipe.write_text(yaml.safe_dump(document))
    refused(recipe, "slices: regmean runs whole models on their data")


@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_a_number_is_told_with_model_and_tensor(models: Path, method: str) -> None:
    file = models / "b" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.input_layernorm.weight"][3] = float("inf")
    save_file(tensors, file, metadata={"format": "pt"})
    refused(write_recipe(models, method), "NaN or Inf", NonFiniteError)
    cache = Path(os.environ["MERGE_CLI_CACHE"]) / "statistics"
    assert not list(cache.rglob("*.partial"))
    assert len(list(cache.rglob("*.safetensors"))) == 1


def test_held_out_files_are_told_to_be_idle(models: Path) -> None:
    data = {"files": "a.jsonl", "held_out": "b.jsonl"}
    recipe = write_recipe(models, "regmean", models=[{"model": "a", "data": data}])
    assert (
        "data.held_out: has no effect: regmean measures nothing" in load_recipe(recipe).warnings[0]
    )


def test_other_vocabularies_are_refused(models: Path) -> None:
    tokenizer = models / "b" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("unused259", "another259"))
    refused(write_recipe(models, "fisher"), "sources' tokenizers differ", MismatchError)
    recipe = write_recipe(models, "fisher", tokenizer_source="union")
    refused(recipe, "fisher runs the models, which must share a vocabulary")


def test_models_of_which_nothing_can_be_gathered_are_refused(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("merge_cli.calibration.plan.linear_layers", lambda net, source: [])
    refused(write_recipe(models, "regmean"), "no stored tensor is a linear layer", SourceError)


def test_the_plan_shows_what_will_be_gathered(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Digests of files that have just been written are not kept, and plans make none.
    monkeypatch.setattr("merge_cli.checkpoint.fingerprint._SETTLED", -1.0)
    runner = CliRunner()
    for method, words in (("regmean", "matrices of layers"), ("fisher", "importances of weights")):
        recipe = write_recipe(models, method)
        shown = runner.invoke(app, ["plan", str(recipe)])
        assert shown.exit_code == 0, shown.output
        assert f"calibration before the merge ({words}" in shown.output
        assert "2 of 2 models to run" in shown.output
        found = json.loads(runner.invoke(app, ["plan", str(recipe), "--json"]).stdout)["gathering"]
        assert [one["cached"] for one in found["sources"]] == [False, False]
        files = calibrated(recipe).files
        cached = json.loads(runner.invoke(app, ["plan", str(recipe), "--json"]).stdout)["gathering"]
        assert cached["bytes_to_gather"] == 0 < found["bytes_to_gather"]
        assert cached["sources"][0]["bytes"] == files[0].size <= found["sources"][0]["bytes"]
        assert found["means"] == cached["means"] == (6 if method == "regmean" else 0)
        out = models / f"out-{method}"
        done = runner.invoke(app, ["run", str(recipe), str(out), "--device", "cpu"])
        assert done.exit_code == 0, done.output
        assert "tokens in 5 examples with a" in done.output


def test_the_result_of_a_stage_is_looked_at_like_any_model(models: Path) -> None:
    stage = {"name": "soup", "merge_method": "linear", "models": ["a", "c"], "dtype": "float32"}
    last = yaml.safe_load(write_recipe(models, "regmean").read_text())
    last["models"][1] = {"model": "soup", "data": "b.jsonl"}
    recipe = models / "two.yaml"
    recipe.write_text(yaml.safe_dump_all([stage, last], sort_keys=False))
    result = merge_cli.merge(recipe, models / "out", options=CPU)
    again = merge_cli.merge(result.path / "merge_recipe.yaml", models / "again", options=CPU)
    assert (again.path / "model.safetensors").read_bytes() == (
        result.path / "model.safetensors"
    ).read_bytes()


def test_statistics_in_a_stage(models: Path) -> None:
    """Its resolved document keeps the data; other data is another stage."""
    stage = {**yaml.safe_load(write_recipe(models, "regmean").read_text()), "name": "reg"}
    last = {"merge_method": "linear", "models": ["reg", "c"]}
    recipe = models / "two.yaml"
    recipe.write_text(yaml.safe_dump_all([stage, last], sort_keys=False))
    result = merge_cli.merge(recipe, models / "out", options=CPU)
    documents = list(yaml.safe_load_all((result.path / "merge_recipe.yaml").read_text()))
    assert documents[0]["models"][0]["data"] == {"files": ["../a.jsonl"]}
    again = merge_cli.merge(result.path / "merge_recipe.yaml", models / "again", options=CPU)
    ours, theirs = ((one.path / "model.safetensors").read_bytes() for one in (result, again))
    assert ours == theirs
    key = work_key(plan_of_stages(recipe), "cpu", True)
    (models / "a.jsonl").write_text('{"text": "something else"}\n')
    assert work_key(plan_of_stages(recipe), "cpu", True) != key


def plan_of_stages(recipe: Path) -> Any:
    return merge_cli.plan(recipe)


def test_a_comparison_counts_what_was_looked_at(models: Path) -> None:
    recipe = write_recipe(models, "fisher")
    found = merge_cli.compare(
        [recipe], models / "a.jsonl", models / "compared", options=["--device", "cpu", "-q"]
    )
    cost = found.comparison["fisher"].cost
    assert cost is not None
    parts = plan_calibration(plan_of(recipe), "cpu").parts
    assert cost.tokens == sum(part.examples.tokens for part in parts)
    assert cost.forward_passes == cost.backward_passes == 10


def test_a_value_for_the_whole_merge_under_a_model_is_told_where_it_stands(models: Path) -> None:
    recipe = write_recipe(models, "regmean")
    recipe.write_text(recipe.read_text().replace("weight: 1.0", "alpha: 0.5"))
    shown = CliRunner().invoke(app, ["plan", str(recipe)])
    assert "has no effect under a model" in " ".join(shown.output.split())
