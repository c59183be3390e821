"""Gathering statistics: shared matrices, rounds, the cache, interruptions, what is refused."""

from __future__ import annotations

import json
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
from dam_tiny import config, write_data, write_models
from safetensors.torch import load_file, save_file
from statistics_tiny import CPU, cache, merged, plan_of, write_recipe
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import merge_cli
from merge_cli.cli import app
from merge_cli.engine.journal import work_key
from merge_cli.engine.planner import load_recipe
from merge_cli.errors import (
    Interrupted,
    MismatchError,
    NonFiniteError,
    RecipeError,
    ResourceError,
    SourceError,
)
from merge_cli.gathering.plan import plan_gathering
from merge_cli.gathering.run import gather, known
from merge_cli.gathering.store import Writer, find, making

__all__ = ["cache"]
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.usefixtures("cache"),
]
METHODS = ("regmean", "fisher")


@pytest.fixture
def models(tmp_path: Path) -> Path:
    write_models(tmp_path, config("llama"), change=0.2)
    write_data(tmp_path)
    return tmp_path


def silent(progress: Any) -> None:
    pass


def gathered(recipe: Path) -> Any:
    return gather(plan_of(recipe), CPU, silent).gathered


def test_layers_that_see_the_same_input_share_a_matrix(models: Path) -> None:
    """q, k and v; gate and up: found by looking, as nothing in the code knows these names."""
    file = gathered(write_recipe(models, "regmean")).files[0]
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
        digests.append(gather(plan, CPU, silent).gathered.digests)  # type: ignore[union-attr]
        for part in plan_gathering(plan, "cpu").parts:
            part.place.unlink()
    assert digests[0] == digests[1] == digests[2]


@pytest.mark.parametrize("method", METHODS)
def test_a_merge_with_other_settings_runs_no_model(
    models: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged(write_recipe(models, method), models / "one")
    monkeypatch.setattr("merge_cli.gathering.run.load", lambda *_, **__: pytest.fail("loaded"))
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
    for part in plan_gathering(plan_of(resolved), "cpu").parts:
        part.place.unlink()
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
    tensors = {}
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
    first = gathered(recipe).files[0]
    lines = (models / "a.jsonl").read_text().splitlines(keepends=True)
    (models / "other.jsonl").write_text("".join(reversed(lines)))
    recipe.write_text(recipe.read_text().replace("a.jsonl", "other.jsonl"))
    assert gathered(recipe).files[0].path == first.path


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_was_stopped_goes_on_with_the_next_model(models: Path, method: str) -> None:
    recipe = write_recipe(models, method)

    def stop(progress: Any) -> None:
        if progress.stage == "gather" and progress.note.endswith("b"):
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="1 of 2 are done"):
        merge_cli.merge(recipe, models / "out", options=CPU, show=stop)
    assert not (models / "out").exists()
    cache = Path(os.environ["MERGE_CLI_CACHE"]) / "statistics"
    assert not list(cache.rglob("*.partial"))
    seen = []
    result = merge_cli.merge(recipe, models / "out", options=CPU, show=seen.append)
    assert {one.note for one in seen if one.stage == "gather"} == {"b"}
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
        "merge_cli.merge(sys.argv[1], sys.argv[2], options=options, show=show)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, recipe, models / "out"], timeout=300)
    assert done.returncode == -signal.SIGKILL
    parts = plan_gathering(plan_of(recipe), "cpu").parts
    assert [part.found is not None for part in parts] == [True, False]
    killed = merged(recipe, models / "out")
    for part in parts:
        part.place.unlink()
    whole = merged(recipe, models / "whole")
    assert all(torch.equal(killed[name], whole[name]) for name in whole)


def test_a_file_that_was_cut_off_is_made_again(models: Path) -> None:
    recipe = write_recipe(models, "regmean")
    file = gathered(recipe).files[0]
    with file.path.open("r+b") as cut:
        cut.truncate(file.path.stat().st_size - 8)
    assert find(file.path) is None
    assert known(plan_of(recipe), "cpu") is None
    assert gathered(recipe).files[0].digest == file.digest


def test_other_statistics_are_other_work(models: Path) -> None:
    """An interrupted merge is not continued with statistics of other examples."""
    keys = []
    for examples in (5, 4):
        plan = gather(
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
        gathered(write_recipe(models, "regmean"))


def test_experts_that_are_stored_one_by_one_are_the_mean(tmp_path: Path) -> None:
    """transformers loads them fused; a tensor that no parameter is has no statistics."""
    folders = write_models(tmp_path, config("mixtral", num_local_experts=4), change=0.2)
    write_data(tmp_path)
    for folder in folders:
        file = folder / "model.safetensors"
        tensors = {}
        for name, tensor in load_file(file).items():
            if name.endswith("experts.gate_up_proj"):
                for i, expert in enumerate(tensor):
                    start = name.replace(
                        "mlp.experts.gate_up_proj", f"block_sparse_moe.experts.{i}"
                    )
                    one, three = expert.chunk(2)
                    tensors |= {f"{start}.w1.weight": one.contiguous(),
                                f"{start}.w3.weight": three.contiguous()}  # fmt: skip
            elif name.endswith("experts.down_proj"):
                for i, expert in enumerate(tensor):
                    start = f"{name.partition('mlp.')[0]}block_sparse_moe.experts.{i}"
                    tensors[f"{start}.w2.weight"] = expert.contiguous()
            else:
                tensors[name.replace("mlp.gate", "block_sparse_moe.gate")] = tensor
        save_file(tensors, file, metadata={"format": "pt"})
    recipe = write_recipe(tmp_path, "regmean")
    decided = plan_gathering(plan_of(recipe), "cpu")
    result = merge_cli.merge(recipe, tmp_path / "out", options=CPU)
    assert result.report["gathered"]["means"] == decided.means >= 2 * 4 * 3
    found = load_file(result.path / "model.safetensors")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "b"))
    name = "model.layers.0.block_sparse_moe.experts.2.w1.weight"
    torch.testing.assert_close(found[name], (one[name] + two[name]) / 2)


def refused(recipe: Path, match: str, kind: type[Exception] = RecipeError) -> None:
    with pytest.raises(kind, match=match):
        gather(plan_of(recipe), CPU, silent)


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
        ("weight: 1.0", "weight: -1.0", "must be a number at least 0"),
        ("weight: 1.0", "alpha: 0.5", "not one for each model"),
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


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_adapters_and_other_vocabularies_are_refused(models: Path) -> None:
    peft = pytest.importorskip("peft")
    net = AutoModelForCausalLM.from_pretrained(models / "b")
    peft.get_peft_model(net, peft.LoraConfig(r=2)).save_pretrained(models / "adapter")
    recipe = write_recipe(models, "fisher")
    recipe.write_text(recipe.read_text().replace("model: b\n", "model: b+adapter\n"))
    refused(recipe, "an adapter is applied while merging", SourceError)
    tokenizer = models / "b" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("unused259", "another259"))
    refused(write_recipe(models, "fisher"), "sources' tokenizers differ", MismatchError)
    recipe = write_recipe(models, "fisher", tokenizer_source="union")
    refused(recipe, "fisher runs the models, which must share a vocabulary")


def test_models_of_which_nothing_can_be_gathered_are_refused(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("merge_cli.gathering.plan.linear_layers", lambda net, source: [])
    refused(write_recipe(models, "regmean"), "no stored tensor is a linear layer", SourceError)


def test_the_plan_shows_what_will_be_gathered(models: Path) -> None:
    runner = CliRunner()
    for method, words in (("regmean", "matrices of layers"), ("fisher", "importances of weights")):
        recipe = write_recipe(models, method)
        shown = runner.invoke(app, ["plan", str(recipe)])
        assert shown.exit_code == 0, shown.output
        assert f"before that, {words}" in shown.output
        assert "2 of 2 models to be run" in shown.output
        found = json.loads(runner.invoke(app, ["plan", str(recipe), "--json"]).stdout)["gathering"]
        assert [one["cached"] for one in found["sources"]] == [False, False]
        files = gathered(recipe).files
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
    parts = plan_gathering(plan_of(recipe), "cpu").parts
    assert cost.tokens == sum(part.examples.tokens for part in parts)
    assert cost.forward_passes == cost.backward_passes == 10
