"""Learning that starts at a whole merge: its first step is that merge; no data are needed after."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
import yaml
from safetensors.torch import load_file

import merge_cli
from merge_cli.dam.plan import TrainingPlan, plan_training
from merge_cli.dam.trainer import Trainer, measured_steps
from merge_cli.errors import Interrupted, RecipeError, SourceError
from merge_cli.options import MergeOptions, Progress
from merge_cli.planning.planner import load_recipe, make_plan
from tests.support.command import cli
from tests.support.dam_tiny import config, write_data, write_models, write_recipe
from tests.support.tiny import read_model

OPTIONS = MergeOptions(device="cpu", threads=1)
QUICK: dict[str, Any] = {
    "preset": "default", "max_steps": 4, "max_length": 24, "top_k": 16, "evaluate_every": 2,
}  # fmt: skip
STATISTICS = {"examples": 6, "max_length": 24}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_models(folder, config("llama"), change=0.3)
    write_data(folder)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGE_CLI_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def recipe_of(folder: Path, *, base: bool = True, **training: Any) -> Path:
    return write_recipe(folder, {**QUICK, **training}, base=base, statistics=STATISTICS)


def run(recipe: Path, out: Path, **options: Any) -> merge_cli.MergeResult:
    return merge_cli.merge(recipe, out, options=OPTIONS, **options)


def decided_of(recipe: Path) -> TrainingPlan:
    return plan_training(make_plan(load_recipe(recipe)), "cpu")


def importances(decided: TrainingPlan) -> list[dict[str, torch.Tensor]]:
    """Of each source in float64: the mean over examples of squared gradients."""
    (merge,) = decided.static
    result = []
    for number, examples in zip(decided.plan.operands, merge.examples, strict=True):
        root = decided.plan.sources[number].root
        net = hf.AutoModelForCausalLM.from_pretrained(root).double()
        total = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
        for example in examples.items:
            ids = torch.tensor([list(example.ids)])
            logp = net(input_ids=ids).logits[0, :-1].log_softmax(-1)
            picked = logp.gather(-1, ids[0, 1:, None])[example.first - 1 :]
            net.zero_grad()
            picked.sum().backward()
            for name, parameter in net.named_parameters():
                assert parameter.grad is not None
                total[name] += parameter.grad**2
        count = len(examples.items)
        means = {name: value / count for name, value in total.items()}
        size = sum(value.numel() for value in means.values())
        scale = (sum(float((value**2).sum()) for value in means.values()) / size) ** 0.5
        result.append({name: value / scale + 1e-6 for name, value in means.items()})
    return result


def test_it_is_the_start_plus_learned_changes_in_float64(models: Path, tmp_path: Path) -> None:
    recipe = recipe_of(models, start="fisher")
    out = run(recipe, tmp_path / "out").path
    shares = importances(decided_of(recipe))
    sources = [
        {name: value.double() for name, value in read_model(models / name_).items()}
        for name_ in ("a", "b", "c", "base")
    ]
    start, merged = read_model(out / "start"), read_model(out)
    learned = load_file(out / "coefficients.safetensors")
    for name, tensor in merged.items():
        total = sum(share[name] for share in shares)
        fisher = sum(share[name] * of[name] for share, of in zip(shares, sources[:3], strict=True))
        np.testing.assert_allclose(start[name].double(), fisher / total, rtol=0, atol=5e-5)
        expected = start[name].double()
        for c, of in zip(learned[name].double(), sources, strict=True):
            expected = expected + c * (of[name] - start[name].double())
        np.testing.assert_allclose(tensor.double(), expected, rtol=0, atol=1e-6)
    assert any(bool((value != 0).any()) for value in learned.values())


@pytest.mark.parametrize("method", ["fisher", "regmean"])
def test_without_a_step_it_is_the_whole_merge(models: Path, tmp_path: Path, method: str) -> None:
    recipe = recipe_of(models, start=method, held_out=0.0, learning_rate=0.0)
    out = run(recipe, tmp_path / "out").path
    kept = load_file(out / "start" / "model.safetensors")
    assert all(
        torch.equal(value, kept[name])
        for name, value in load_file(out / "model.safetensors").items()
    )
    learned = load_file(out / "coefficients.safetensors").values()
    assert all(not bool(value.any()) for value in learned)


@pytest.mark.parametrize("base", [True, False])
def test_running_its_recipe_needs_no_data_and_gives_the_same_bytes(
    models: Path, tmp_path: Path, base: bool
) -> None:
    folder = tmp_path / "family"
    shutil.copytree(models, folder)
    recipe = recipe_of(folder, base=base, start="regmean")
    decided = decided_of(recipe)
    result = run(recipe, folder / "out")
    learned = result.report["training"]["coefficients"]
    assert learned == (decided.coefficients_from_whole if base else decided.coefficients)
    written = yaml.safe_load((result.path / "merge_recipe.yaml").read_text())
    assert written["base_model"] == "./start"
    assert written["training"]["form"] == "task_vector"
    assert "statistics" not in written
    for file in folder.glob("*.jsonl"):
        file.unlink()
    again = run(result.path / "merge_recipe.yaml", tmp_path / "again")
    assert (again.path / "model.safetensors").read_bytes() == (
        result.path / "model.safetensors"
    ).read_bytes()
    assert result.report["training"]["start"] == "regmean"
    assert [item["model"] for item in result.report["inputs"]] == [
        *("./start", "a", "b", "c"),
        *(["base"] if base else []),
    ]
    assert (result.path / "start" / "config.json").exists()


def test_the_best_begins_at_what_was_measured(models: Path, tmp_path: Path) -> None:
    training = run(recipe_of(models), tmp_path / "out").report["training"]
    scores = training["scores"]
    assert {"fisher", "regmean", "uniform soup", "base"} < set(scores)
    best = min((name for name in scores if name != "dam"), key=lambda n: scores[n]["mean_kl"])
    assert training["start"] == best
    first = training["measured"][0]
    assert first["step"] == 0
    assert first["mean_kl"] == scores[best]["mean_kl"]
    assert scores["dam"]["mean_kl"] <= scores[best]["mean_kl"]


def test_what_is_not_trained_stays_at_the_whole_merge(models: Path, tmp_path: Path) -> None:
    out = run(recipe_of(models, start="fisher", train=["mlp"], keep="last"), tmp_path / "out").path
    start, merged = read_model(out / "start"), read_model(out)
    moved = {name for name in merged if not torch.equal(start[name], merged[name])}
    assert moved
    assert all("mlp" in name for name in moved)


@pytest.mark.parametrize(
    ("start", "train"), [("fisher", ["all"]), ("fisher", ["mlp"]), ("best", ["mlp"])]
)
def test_a_run_that_is_stopped_ends_with_the_same_bytes(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: str, train: list[str]
) -> None:
    recipe = recipe_of(models, start=start, train=train, checkpoint_minutes=0.0)
    whole = run(recipe, tmp_path / "whole").path
    step = Trainer._step

    def stopped(self: Trainer, number: int) -> Any:
        if number == 2:
            raise KeyboardInterrupt
        return step(self, number)

    monkeypatch.setattr(Trainer, "_step", stopped)
    with pytest.raises(Interrupted):
        run(recipe, tmp_path / "out")
    monkeypatch.undo()
    monkeypatch.setenv("MERGE_CLI_CACHE", str(tmp_path / "cache"))
    out = run(recipe, tmp_path / "out").path
    for name in ("model.safetensors", "coefficients.safetensors"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_no_held_out_row_is_looked_at(models: Path) -> None:
    decided = decided_of(recipe_of(models))
    for dataset in decided.datasets:
        held_out = {bytes(e.ids.tobytes()) for e in (*dataset.held_out, *dataset.test)}
        for merge in decided.static:
            looked_at = {bytes(e.ids.tobytes()) for e in merge.examples[dataset.source].items}
            assert looked_at
            assert not looked_at & held_out


def test_the_plan_says_what_is_looked_at_and_kept(models: Path) -> None:
    text = cli("plan", recipe_of(models)).stdout
    assert "fisher looks at" in text
    assert "OUT keeps it, too" in " ".join(text.split())


def test_a_source_without_data_leaves_whole_merges_out(models: Path) -> None:
    recipe = recipe_of(models)
    document = yaml.safe_load(recipe.read_text())
    del document["models"][1]["data"]
    recipe.write_text(yaml.safe_dump(document))
    decided = decided_of(recipe)
    assert decided.static == ()
    assert "data of every source" in decided.why["start"]
    document["training"]["start"] = "fisher"
    recipe.write_text(yaml.safe_dump(document))
    with pytest.raises(SourceError, match="data of every source"):
        decided_of(recipe)


def test_sums_of_weights_are_refused(models: Path) -> None:
    with pytest.raises(RecipeError, match="do not reach the merge that fisher makes"):
        load_recipe(recipe_of(models, start="fisher", form="soup"))
    decided = decided_of(recipe_of(models, form="soup"))
    assert decided.static == ()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("method", ["dam", "fisher", "regmean", "auto"])
def test_a_model_with_an_adapter_is_a_source_like_any_other(
    models: Path, tmp_path: Path, method: str
) -> None:
    """The same bytes as with the two in one folder, in float32."""
    peft = pytest.importorskip("peft")
    folder = tmp_path / "family"
    shutil.copytree(models, folder)
    net = hf.AutoModelForCausalLM.from_pretrained(folder / "b")
    options = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    peft.get_peft_model(net, options).save_pretrained(folder / "adapter")
    one = {"merge_method": "passthrough", "models": [{"model": "b+adapter"}], "dtype": "float32"}
    (folder / "one.yaml").write_text(yaml.safe_dump(one))
    run(folder / "one.yaml", tmp_path / "whole" / "b+adapter")  # data are mixed by the name
    weights = []
    for number, name in enumerate(("b+adapter", str(tmp_path / "whole" / "b+adapter"))):
        document: dict[str, Any] = {
            "merge_method": method,
            "models": [
                {"model": "a", "data": "a.jsonl"},
                {"model": name, "data": "b.jsonl"},
            ],
            "statistics": STATISTICS,
            **({"training": {**QUICK, "start": "fisher"}} if method == "dam" else {}),
            **({"methods": ["search"]} if method == "auto" else {}),
            "dtype": "float32",
        }
        if method == "auto":
            document.pop("statistics")
            for item in document["models"]:
                rows = (folder / item["data"]).read_text()
                more = [rows.replace(" 1", f" {i}1").replace("xxx", f"x{i}xx") for i in range(6)]
                (folder / f"more.{item['data']}").write_text(rows + "".join(more))
                item["data"] = f"more.{item['data']}"
        recipe = folder / f"{number}.yaml"
        recipe.write_text(yaml.safe_dump(document))
        out = run(recipe, tmp_path / f"out{number}").path
        weights.append((out / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    rows = folder / "b.jsonl"
    losses = [
        merge_cli.evaluate(model, rows, device="cpu").tasks["b"].value
        for model in (f"{folder}/b+{folder}/adapter", tmp_path / "whole" / "b+adapter")
    ]
    assert losses[0] == losses[1]


def test_it_says_what_it_is_at(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MERGE_CLI_CACHE", str(tmp_path / "cache"))
    lines: list[Progress] = []
    run(recipe_of(models), tmp_path / "out", on_progress=lines.append)
    assert {"teach", "gather", "baselines", "train"} <= {line.stage for line in lines}


def test_measuring_costs_a_tenth_of_training_at_most(models: Path) -> None:
    decided = decided_of(recipe_of(models, max_steps=40))
    by_default = replace(decided, training=replace(decided.training, evaluate_every=None))
    held_out = sum(len(e.ids) for data in decided.datasets for e in data.held_out)
    due = measured_steps(by_default)
    assert max(due) == decided.steps
    assert (len(due) - 1) * held_out / 3 <= 0.1 * decided.tokens
    assert measured_steps(decided) == {*range(2, decided.steps, 2), decided.steps}
    longer = replace(by_default, steps=64, datasets=decided.datasets)
    assert measured_steps(longer) <= {64, 32, 16, 8, 4, 2, 1}


@pytest.mark.parametrize("start", ["fisher", "soup", 0.4])
def test_without_baselines_only_the_start_is_measured(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: Any
) -> None:
    """Two measurements of what is learned take the place of those of thirteen merges."""
    monkeypatch.setenv("MERGE_CLI_CACHE", str(tmp_path / "cache"))
    lines: list[Progress] = []
    recipe = recipe_of(models, start=start, baselines=False, evaluate_every=None, max_steps=4)
    training = run(recipe, tmp_path / "out", on_progress=lines.append).report["training"]
    whole = [start] if start == "fisher" else []
    assert [*training["scores"]] == ["dam", *whole]
    assert training["start"] == "".join(whole)
    assert [measured["step"] for measured in training["measured"]] == [0, 2, 4]
    assert training["test_scores"] == {}
    compared = {line.note for line in lines if line.stage == "baselines"}
    assert compared == {*whole}
    kept = training["measured"][0]
    assert training["scores"]["dam"]["mean_loss"] <= kept["mean_loss"]
    assert training["scores"]["dam"]["mean_kl"] <= kept["mean_kl"]


def test_the_best_is_not_known_without_baselines(models: Path) -> None:
    with pytest.raises(RecipeError, match="nobody knows where the best is"):
        load_recipe(recipe_of(models, start="best", baselines=False))


def test_a_stage_that_learns_keeps_its_start_in_the_result(models: Path, tmp_path: Path) -> None:
    folder = tmp_path / "family"
    shutil.copytree(models, folder)
    learned = yaml.safe_load(recipe_of(folder, start="fisher").read_text())
    mean = {"merge_method": "soup", "models": [{"model": "learned"}, {"model": "a"}]}
    (folder / "stages.yaml").write_text(yaml.safe_dump_all([{"name": "learned", **learned}, mean]))
    out = run(folder / "stages.yaml", tmp_path / "out").path
    assert (out / "stages" / "learned" / "start" / "model.safetensors").exists()
    for file in folder.glob("*.jsonl"):
        file.unlink()
    again = run(out / "merge_recipe.yaml", tmp_path / "again").path
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
