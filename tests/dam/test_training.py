"""From a recipe to a merged model: training, measuring, resuming, the report, the command line."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import merge_cli
from merge_cli.dam.checkpoint import TrainingWorkspace
from merge_cli.dam.panel import granularity_in_words
from merge_cli.dam.plan import plan_training
from merge_cli.dam.start import LAMBDAS
from merge_cli.dam.trainer import Trainer
from merge_cli.errors import (
    GateError,
    Interrupted,
    MismatchError,
    RecipeError,
    ResourceError,
    UsageError,
)
from merge_cli.options import MergeOptions, Progress
from merge_cli.recipe.training import Training
from tests.support.command import cli
from tests.support.dam_tiny import (
    config,
    plan_of,
    student_of,
    write_data,
    write_models,
    write_recipe,
)
from tests.support.html import Page
from tests.support.paths import ROOT
from tests.support.tiny import read_model

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
OPTIONS = MergeOptions(device="cpu", threads=1)
QUICK: dict[str, Any] = {
    "max_steps": 6, "max_length": 24, "batch_size": 2, "learning_rate": 0.02, "top_k": 16,
    "evaluate_every": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_models(folder, config("llama"), names=("base", "a", "b", "c"), change=0.3)
    write_data(folder)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("MERGE_CLI_CACHE", str(folder))
    return folder


def recipe_of(models: Path, **training: Any) -> Path:
    return write_recipe(models, {**QUICK, **training})


def run(recipe: Path, out: Path, **options: Any) -> merge_cli.MergeResult:
    return merge_cli.merge(recipe, out, options=OPTIONS, **options)


def entries(out: Path) -> Mapping[str, torch.Tensor]:
    return load_file(out / "coefficients.safetensors")


def same(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_recipe_trains_merges_and_runs_again_without_training(
    models: Path, tmp_path: Path
) -> None:
    lines: list[Progress] = []
    result = run(recipe_of(models), tmp_path / "out", on_progress=lines.append)
    training = result.report["training"]
    for one in training["datasets"]:
        assert one["files"]
        assert len(one["digest"]) == 64
    assert training["steps"] == 6
    assert training["measured"][0]["step"] == 0
    assert training["scores"]["dam"]["mean_kl"] < training["measured"][0]["mean_kl"]
    names = set(training["scores"])
    assert {"dam", "base", "source a", "source b", "source c", "uniform soup"} < names
    assert sum(name.startswith("task arithmetic") for name in names) == len(LAMBDAS)
    assert {"task arithmetic 0.1", "task arithmetic 0.2", "task arithmetic 0.3"} < names
    assert training["cost"]["passes"] == 6  # one for all data sets in each step
    assert {"teach", "train", "baselines", "merge"} <= {line.stage for line in lines}
    steps = [line.note for line in lines if line.unit == "steps"]
    assert all(word in steps[-1] for word in ("loss", "a ", "b ", "c ", "held-out KL", "left"))
    assert not (tmp_path / "out.training").exists()

    written = yaml.safe_load((tmp_path / "out" / "merge_recipe.yaml").read_text())
    assert written["training"]["granularity"] == "column"  # defaults are written out
    assert all("data" not in model for model in written["models"])
    origin = [{k: one[k] for k in ("teacher", "files", "held_out_files", "digest")}
              for one in training["datasets"]]  # fmt: skip
    assert written["metadata"]["learned_from"] == origin
    again = merge_cli.merge(tmp_path / "out" / "merge_recipe.yaml", tmp_path / "again",
                            options=OPTIONS)  # fmt: skip
    assert "training" not in again.report
    assert (again.path / "model.safetensors").read_bytes() == (
        result.path / "model.safetensors"
    ).read_bytes()
    page = (result.path / "merge_report.html").read_text()
    Page(page)  # well formed: every tag nests
    for part in ("Whether it was worth it", "Learned coefficients", "Held-out KL", "tokens/s"):
        assert part in page


def test_the_model_is_the_student(models: Path, tmp_path: Path) -> None:
    """What the engine writes is what was measured: the same weights to the last bit in float32."""
    result = run(recipe_of(models, max_steps=2, evaluate_every=1), tmp_path / "out")
    plan = plan_of(models, {**QUICK})
    student = student_of(plan, torch.float32)
    found = entries(result.path)
    for name, own in student.coefficients.items():
        own.raw.copy_(found[name].reshape(own.raw.shape))
        own.moved()
    student.write_all()
    merged = read_model(result.path)
    for name, seat in student.merged_parameters.items():
        assert torch.equal(seat.parameter, merged[name]), name


def test_residency_changes_no_bit(models: Path, tmp_path: Path) -> None:
    found = [
        entries(run(recipe_of(models, residency=where), tmp_path / where).path)
        for where in ("host", "disk")
    ]
    assert same(*found)


@pytest.mark.parametrize("stop_at", [1, 4])
def test_stopped_and_continued_is_the_same_bit_for_bit(
    models: Path, tmp_path: Path, stop_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGINT between steps, a checkpoint, and on; and killed without one after the last."""
    recipe = recipe_of(models, optimizer="mofo", activation="tanh")
    whole = entries(run(recipe, tmp_path / "whole").path)
    step = Trainer._step

    def interrupted(self: Trainer, number: int) -> dict[str, Any]:
        found = step(self, number)
        if number == stop_at:
            os.kill(os.getpid(), signal.SIGINT)
        return found

    def killed(self: Trainer, number: int) -> dict[str, Any]:
        if number == stop_at + 1:
            raise MemoryError("as if killed: nothing is saved")
        return step(self, number)

    monkeypatch.setattr(Trainer, "_step", interrupted)
    with pytest.raises(Interrupted, match=f"stopped after {stop_at + 1} steps"):
        run(recipe, tmp_path / "out")
    assert (tmp_path / "out.training" / "checkpoint.safetensors").exists()
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(Trainer, "_step", killed)
    with pytest.raises(ResourceError, match="memory ran out.*batch_tokens"):
        run(recipe, tmp_path / "out")
    monkeypatch.setattr(Trainer, "_step", step)
    seen: list[int] = []
    monkeypatch.setattr(Trainer, "_step", lambda self, n: seen.append(n) or step(self, n))
    result = run(recipe, tmp_path / "out")
    assert seen[0] == stop_at + 1
    assert same(whole, entries(result.path))
    history = result.report["training"]["history"]
    assert [one["step"] for one in history] == list(range(6))


@pytest.mark.slow
def test_sigkill_at_a_random_moment(models: Path, tmp_path: Path) -> None:
    """Real processes, each killed somewhere after its next checkpoint; the last one ends."""
    recipe = recipe_of(models, max_steps=60, checkpoint_minutes=0.0, examples=20)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "merge_cli", "run", "-q", "--threads", "1", str(recipe)]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, env=environment)
    checkpoint = tmp_path / "out.training" / "checkpoint.safetensors"
    draw = random.Random(5)

    def stamp() -> int:
        return checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0

    for _ in range(4):
        before = stamp()
        process = subprocess.Popen([*command, str(tmp_path / "out")], env=environment)
        while process.poll() is None and stamp() == before:
            time.sleep(0.002)
        time.sleep(0.1 * draw.random())
        process.kill()
        assert process.wait() == -signal.SIGKILL, "it had ended before it was killed"
    subprocess.run([*command, str(tmp_path / "out")], check=True, env=environment)
    assert same(entries(tmp_path / "whole"), entries(tmp_path / "out"))
    costs = []
    for name in ("whole", "out"):
        report = json.loads((tmp_path / name / "merge_report.json").read_text())
        costs.append(report["training"]["cost"])
    for part in ("tokens", "passes", "held_out_passes"):
        assert costs[0][part] == costs[1][part], part  # over all runs, whatever was killed
    assert costs[1]["teaching_seconds"] > 0


def test_other_work_is_not_continued(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer._step

    def interrupted(self: Trainer, number: int) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGTERM)
        return step(self, number)

    monkeypatch.setattr(Trainer, "_step", interrupted)
    with pytest.raises(Interrupted):
        run(recipe_of(models), tmp_path / "out")
    monkeypatch.setattr(Trainer, "_step", step)
    with pytest.raises(UsageError, match="of another recipe"):
        run(recipe_of(models, temperature=1.0), tmp_path / "out")
    options = MergeOptions(device="cpu", threads=1, fresh=True)
    merge_cli.merge(recipe_of(models, temperature=1.0), tmp_path / "out", options=options)


def test_an_existing_output_is_refused_before_training(models: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("precious")
    with pytest.raises(UsageError, match="exists already"):
        run(recipe_of(models), tmp_path / "out")
    assert not (tmp_path / "out.training").exists()


def test_improvement_is_required_or_said_loudly(models: Path, tmp_path: Path) -> None:
    """A rate of 0 learns nothing: the soup it starts from is as good."""
    recipe = recipe_of(models, learning_rate=0.0)
    with pytest.raises(GateError, match="is no better than"):
        run(recipe, tmp_path / "gated", require_improvement=True)
    assert not (tmp_path / "gated").exists()
    lines: list[Progress] = []
    result = run(recipe, tmp_path / "out", on_progress=lines.append)
    assert result.report["training"]["verdict"]["ratio"] >= 1
    assert any("NO IMPROVEMENT" in line.note for line in lines)
    assert "NO IMPROVEMENT" in (result.path / "merge_report.html").read_text()


def test_early_stopping_keeps_the_best(models: Path, tmp_path: Path) -> None:
    result = run(
        recipe_of(models, learning_rate=5.0, max_steps=12, evaluate_every=1, patience=2),
        tmp_path / "out",
    )
    training = result.report["training"]
    assert training["ended"] == "no improvement in 2 measurements"
    assert training["steps"] < 12
    best = min(training["measured"], key=lambda one: one["mean_kl"])
    assert training["best_step"] == best["step"]
    assert training["scores"]["dam"]["mean_kl"] == best["mean_kl"]


def test_the_last_step_is_kept_where_it_is_asked_for(models: Path, tmp_path: Path) -> None:
    """Though it is far worse than the first: the rate is too large."""
    kept = {}
    for keep in ("best", "last"):
        recipe = recipe_of(models, learning_rate=3, schedule="constant", keep=keep)
        result = run(recipe, tmp_path / keep)
        training = result.report["training"]
        by_step = {one["step"]: one["mean_kl"] for one in training["measured"]}
        assert by_step[6] > by_step[0]
        assert training["scores"]["dam"]["mean_kl"] == by_step[training["best_step"]]
        kept[keep] = training["best_step"], entries(result.path)
    assert (kept["best"][0], kept["last"][0]) == (0, 6)
    assert not same(kept["best"][1], kept["last"][1])


@pytest.mark.parametrize(
    "dials",
    [
        {"preset": "dam-reference", "examples": 12},
        {"preset": "adamerging", "held_out_examples": 2},
        {"preset": "expert-merging", "top_k": "full"},
        {"preset": "learned-soup", "schedule": "cosine", "warmup": 0.3},
        {"granularity": "low_rank", "rank": 2, "loss": {"reverse_kl": 1, "mse": 0.1}},
        {"granularity": "element", "form": "task_vector", "clip_norm": 0.1,
         "regularize": {"l1": 0.1, "overlap": 0.1, "weighted_overlap": 0.1}},
        {"granularity": {"embed_tokens": "row", "*layers.0.*": "tensor", "norm": "element"}},
        {"dtype": "float16", "loss": "cross_entropy"},
        {"dtype": "bfloat16", "checkpointing": True, "cache_dtype": "float16"},
        {"train": ["mlp", "norm"], "granularity": "row", "mode": "two_pass", "prompt_loss": True},
    ],
    ids=lambda dials: str(dials.get("preset") or dials.get("granularity") or dials["dtype"]),
)  # fmt: skip
def test_presets_and_dials(models: Path, tmp_path: Path, dials: dict[str, Any]) -> None:
    quick = {k: v for k, v in QUICK.items() if k not in ("top_k",)} | {"max_steps": 3}
    recipe = write_recipe(models, {**quick, **dials})
    result = run(recipe, tmp_path / "out")
    training = result.report["training"]
    assert training["steps"] == 3
    assert all(one["loss"] == one["loss"] for one in training["history"])
    resolved = yaml.safe_load((result.path / "merge_recipe.yaml").read_text())["training"]
    assert resolved | {k: v for k, v in dials.items() if k not in ("train", "loss")} == resolved
    if dials.get("preset") == "dam-reference":
        found = entries(result.path)
        assert found["model.norm.weight"].shape == (3, 1)  # not trained: one number for each
        assert found["model.layers.0.mlp.up_proj.weight"].shape == (3, 1, 16)
    if isinstance(dials.get("granularity"), dict):
        found = entries(result.path)
        rows = read_model(models / "a")["model.embed_tokens.weight"].shape[0]
        assert found["model.embed_tokens.weight"].shape == (3, rows, 1)
        assert found["model.layers.1.mlp.up_proj.weight"].shape == (3, 1, 16), "no pattern"
        assert found["model.norm.weight"].shape == (3, 16)


def test_a_data_set_without_held_out_rows_does_not_stop_measuring(tmp_path: Path) -> None:
    write_models(tmp_path, config("llama"))
    write_data(tmp_path)
    rows = (tmp_path / "a.jsonl").read_text().splitlines()
    (tmp_path / "a.jsonl").write_text(rows[0] + "\n")
    training = run(recipe_of(tmp_path, max_steps=2), tmp_path / "out").report["training"]
    kl = training["scores"]["dam"]["kl"]
    assert "a" not in kl
    assert set(kl) == {"b", "c"}
    assert training["verdict"] is not None
    assert any("no rows are held out of a:" in line for line in training["warnings"])


def test_the_plan_shows_the_training_without_loading_weights(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    from merge_cli.dam.panel import training_json

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the plan loads no weights")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    decided = plan_training(plan_of(models, {**QUICK, "examples": 8}), "cpu")
    shown = training_json(decided)
    assert shown["steps"] == 4
    assert [one["train"] for one in shown["datasets"]] == [8, 8, 8]
    tensors = [name for name in read_model(models / "a")]
    assert len(decided.targets) == len(tensors)
    # One for each column of a matrix, one for each element of a vector, for each source.
    numbers = sum(tensor.shape[-1] for tensor in read_model(models / "a").values())
    assert shown["coefficients"] == 3 * numbers
    assert shown["cache_bytes"] > 0
    assert (shown["residency"], shown["mode"]) == ("host", "fused")
    assert "fit in memory" in shown["why"]["residency"]


def test_different_tokenizers_are_refused_in_the_plan(tmp_path: Path) -> None:
    write_models(tmp_path, config("llama"))
    file = tmp_path / "b" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(content))
    with pytest.raises(MismatchError, match="tokenizers differ") as error:
        plan_training(plan_of(tmp_path, {}), "cpu")
    assert "b: has another tokenizer than a" in str(error.value)
    assert "2 of them elsewhere" in str(error.value)


@pytest.mark.parametrize(
    ("part", "value", "said"),
    [("normalizer", {"type": "Lowercase"}, "another normalizer"),
     ("pre_tokenizer", {"type": "Whitespace"}, "another pre_tokenizer")],
)  # fmt: skip
def test_the_same_entries_used_otherwise_are_another_tokenizer(
    tmp_path: Path, part: str, value: dict[str, str], said: str
) -> None:
    write_models(tmp_path, config("llama"))
    file = tmp_path / "b" / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), part: value}))
    with pytest.raises(MismatchError) as error:
        plan_training(plan_of(tmp_path, {}), "cpu")
    assert f"b: has another tokenizer than a: the same entries, and {said}" in str(error.value)


def test_another_template_is_said(tmp_path: Path) -> None:
    write_models(tmp_path, config("llama"))
    write_data(tmp_path)
    assert "chat template" not in plan_training(plan_of(tmp_path, QUICK), "cpu").why
    (tmp_path / "b" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    why = plan_training(plan_of(tmp_path, QUICK), "cpu").why
    assert why["chat template"] == "a's, for all data; b has another"


def test_different_vocabularies_are_refused_in_the_plan(tmp_path: Path) -> None:
    write_models(tmp_path, config("llama"), names=("base", "a", "b"))
    write_models(tmp_path, config("llama", vocab_size=300), names=("c",))
    with pytest.raises(MismatchError, match="vocabularies differ in size"):
        plan_of(tmp_path, {})


def test_experts_that_are_stored_one_by_one_are_learned(tmp_path: Path) -> None:
    """transformers stacks them; each keeps coefficients of its own, and the result loads."""
    import transformers as hf

    from tests.support.dam_tiny import write_experts

    write_experts(tmp_path, "mixtral", dtype=torch.bfloat16)
    write_data(tmp_path)
    result = run(write_recipe(tmp_path, {**QUICK, "train": "linear"}), tmp_path / "out")
    assert result.report["training"]["best_step"] > 0
    found = entries(result.path)
    expert = "model.layers.1.block_sparse_moe.experts.1.w2.weight"
    assert found[expert].shape == (3, 1, 24)
    assert not torch.equal(found[expert], torch.full_like(found[expert], 1 / 3))
    router = found["model.layers.1.block_sparse_moe.gate.weight"]
    assert torch.equal(router, torch.full_like(router, 1 / 3))  # no linear layer: not trained
    _, info = hf.AutoModelForCausalLM.from_pretrained(result.path, output_loading_info=True)
    assert not info["missing_keys"]


def test_parameters_that_nothing_stored_fills_are_refused_in_the_plan(tmp_path: Path) -> None:
    import transformers as hf

    from tests.support.dam_tiny import write_tokenizer

    of = config("mixtral", num_local_experts=2)
    for name in ("base", "a", "b", "c"):
        hf.AutoModelForCausalLM.from_config(of).save_pretrained(tmp_path / name)
        write_tokenizer(tmp_path / name)
        about = tmp_path / name / "config.json"
        about.write_text(json.dumps({**json.loads(about.read_text()), "num_local_experts": 3}))
    with pytest.raises(MismatchError, match="builds it from tensors that are stored"):
        plan_training(plan_of(tmp_path, {}), "cpu")


def test_mixed_tied_and_untied_heads(tmp_path: Path) -> None:
    """A source that ties its head lends its embedding; the output is untied, as the plan says."""
    write_models(tmp_path, config("llama", tied=True), names=("base", "a", "b"))
    write_models(tmp_path, config("llama", tied=False), names=("c",), seed=1)
    write_data(tmp_path)
    recipe = write_recipe(tmp_path, {**QUICK, "max_steps": 2, "keep": "last"})
    plan = merge_cli.plan(recipe)
    assert any("the output stores its own" in note for note in plan.notes)
    result = run(recipe, tmp_path / "out")
    found = entries(result.path)
    assert "lm_head.weight" in found
    assert not torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])


def test_what_cannot_be_is_said_with_its_place(models: Path) -> None:
    document = yaml.safe_load(recipe_of(models).read_text())
    for model in document["models"]:
        model.pop("data")
    (models / "recipe.yaml").write_text(yaml.safe_dump(document))
    with pytest.raises(RecipeError, match="no model has `data:`"):
        merge_cli.load_recipe(models / "recipe.yaml")
    wrong = recipe_of(models, granularity="colum", mode="fused", clip_norm=1.0, learning_rat=1)
    with pytest.raises(RecipeError) as error:
        merge_cli.load_recipe(wrong)
    text = str(error.value)
    assert "Did you mean 'column'?" in text
    assert "Did you mean 'learning_rate'?" in text
    assert "clipping needs all gradients" in text
    assert all(p.line and p.column for p in error.value.problems)
    nothing = recipe_of(models, train=["no_such_tensor"])
    with pytest.raises(MismatchError, match="chooses no tensor"):
        plan_training(merge_cli.plan(nothing), "cpu")


@pytest.mark.parametrize(
    "granularity", ["colum", {}, {"embed": "rows"}, {"embed": 1}, ["row"], 3, {"embed": None}]
)
def test_a_granularity_that_is_none(models: Path, granularity: Any) -> None:
    with pytest.raises(RecipeError, match=r"recipe\.yaml:\d+:\d+: training\.granularity: must be"):
        merge_cli.load_recipe(recipe_of(models, granularity=granularity))


@pytest.mark.parametrize("start", ["soup", "task_arithmetic", "best", 0.2, "2e-1"])
def test_a_start_is_a_word_or_a_number(models: Path, start: Any) -> None:
    training = merge_cli.load_recipe(recipe_of(models, start=start)).learning
    assert training.start == (0.2 if start == "2e-1" else start)
    for wrong in ("soop", None, [1]):
        with pytest.raises(RecipeError, match=r"training\.start: must be"):
            merge_cli.load_recipe(recipe_of(models, start=wrong))


def test_the_first_pattern_that_matches_counts() -> None:
    """A pattern with `*` is of the whole name."""
    training = Training(granularity={"layers.*.mlp*": "row", "mlp": "tensor", "q_proj": "element"})
    names = {"model.layers.3.mlp.up": "tensor", "layers.3.mlp.up": "row", "x.mlp.up": "tensor",
             "layers.0.self_attn.q_proj.weight": "element", "lm_head": "column"}  # fmt: skip
    assert {name: training.granularity_of(name) for name in names} == names
    assert granularity_in_words(training).endswith("element for q_proj, column for the rest")
    assert Training(granularity="row").granularity_of("lm_head") == "row"
    assert training.unused_patterns(["x.mlp.up", "layers.0.q_proj"]) == ["layers.*.mlp*"]
    assert Training().unused_patterns(["x"]) == []


def test_the_command_line(models: Path, tmp_path: Path) -> None:
    """Plain lines in a log, and exit code 5 at the gate."""
    recipe = recipe_of(models, learning_rate=0.0, max_steps=2)
    done = cli("run", "--require-improvement", "--threads", "1", recipe, tmp_path / "out")
    assert done.returncode == 5, done.stderr
    assert "Gate error: held-out KL" in done.stderr
    assert "train 2/2 steps: loss" in done.stderr
    assert "\x1b" not in done.stderr


def test_the_plan_as_json(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from merge_cli.console import Screen

    plan = merge_cli.plan(recipe_of(models, max_steps=2))
    Screen().plan(plan, OPTIONS, every=False, as_json=True)
    assert json.loads(capsys.readouterr().out)["training"]["steps"] == 2
    Screen().plan(plan, OPTIONS, every=False, as_json=False)
    shown = capsys.readouterr().out
    for part in ("training before the merge", "coefficients:", "predictions:", "fit in memory"):
        assert part in shown


def test_tensorboard_scalars(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a writer that records."""
    import types

    written: list[tuple[str, float, int]] = []

    class Writer:
        def __init__(self, folder: str) -> None:
            assert folder.endswith("out.tensorboard")

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, value, step))

        def close(self) -> None:
            written.append(("closed", 0.0, 0))

    recipe = recipe_of(models, max_steps=2, evaluate_every=2, tensorboard=True)
    monkeypatch.setattr("merge_cli.dam.plan.find_spec", lambda name: object())
    module = types.SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    run(recipe, tmp_path / "out")
    names = {name for name, _, _ in written}
    assert names == {"loss", "rate", "kl/a", "kl/b", "kl/c", "penalty/cosine", "held-out/kl",
                     "closed"}  # fmt: skip
    assert [step for name, _, step in written if name == "loss"] == [1, 2]


def test_methods_explains_the_dials(capsys: pytest.CaptureFixture[str]) -> None:
    from dataclasses import fields

    from merge_cli.console import Screen
    from merge_cli.methods.registry import get_method
    from merge_cli.recipe.training import Training
    from merge_cli.recipe.training_presets import PRESETS, preset

    Screen().method(get_method("dam"), as_json=False)
    shown = capsys.readouterr().out
    page = (ROOT / "docs" / "dam.md").read_text(encoding="utf-8")
    for dial in fields(Training):
        assert f"  {dial.name}: " in shown
        assert f"`{dial.name}`" in page
    for name in PRESETS:
        assert preset(name).preset == name
        assert f"`{name}`" in page
    Screen().method(get_method("dam"), as_json=True)
    assert len(json.loads(capsys.readouterr().out)["training"]) == len(fields(Training))


def test_the_folder_is_locked(models: Path, tmp_path: Path) -> None:
    with TrainingWorkspace(tmp_path / "out", "one") as folder:
        assert folder.record() is None
        with (
            pytest.raises(merge_cli.MergeCliError, match="another training is writing here"),
            TrainingWorkspace(tmp_path / "out", "one"),
        ):
            pass
