"""From a recipe that leaves the method open to the best merge: the path, budgets, resuming."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import transformers as hf
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import merge_cli
from merge_cli.auto.measure import Losses
from merge_cli.auto.plan import LAMBDAS, plan_automatic
from merge_cli.auto.search import CandidateSearch
from merge_cli.auto.trials import Trials
from merge_cli.auto.verdict import choose
from merge_cli.auto.weights import Weights, WeightSearch, candidate_count
from merge_cli.auto.worker import Answer, Job
from merge_cli.auto.workspace import AutomaticWorkspace
from merge_cli.dam.run import learn
from merge_cli.data.rows import part_of, read_data
from merge_cli.errors import GateError, Interrupted, RecipeError, ResourceError, SourceError
from merge_cli.evaluation.result import Metric
from merge_cli.evaluation.rows import content_of
from merge_cli.methods.registry import get_method
from merge_cli.options import MergeOptions, Progress, ignore_progress
from merge_cli.planning.plan import Plan
from merge_cli.planning.planner import load_recipe, make_plan
from merge_cli.planning.preparation import preparations_of
from merge_cli.recipe.data import Data
from merge_cli.recipe.schema import Recipe
from tests.support.dam_tiny import config, write_data, write_models

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
OPTIONS = MergeOptions(device="cpu", threads=1)
NAMES = ("a", "b")
QUICK: dict[str, Any] = {
    "training": {"max_steps": 3, "max_length": 24, "top_k": 16, "held_out_tokens": 64},
    "statistics": {"examples": 8, "max_length": 24},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_models(folder, config("llama"), names=("base", *NAMES), change=0.3)
    write_data(folder, NAMES, rows=100)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGE_CLI_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def write_recipe(folder: Path, name: str = "auto.yaml", **keys: Any) -> Path:
    document = {
        "merge_method": "auto",
        "base_model": "base",
        "models": [{"model": name, "data": f"{name}.jsonl"} for name in NAMES],
        **QUICK,
        **keys,
    }
    path = folder / name
    path.write_text(yaml.safe_dump({k: v for k, v in document.items() if v is not None}))
    return path


def run(recipe: Path, out: Path, **options: Any) -> dict[str, Any]:
    return dict(merge_cli.merge(recipe, out, options=OPTIONS, **options).report["auto"])


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def loss_of(folder: Path, recipe: Path, part: str) -> float:
    """The mean loss of a model on disk, by transformers alone, row by row."""
    net = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    decided = plan_automatic(make_plan(load_recipe(recipe)), OPTIONS)
    means = []
    for data in decided.parts:
        total = count = 0.0
        for row in getattr(data, part):
            for item in row:
                ids = torch.tensor([list(item.ids)])
                labels = ids.clone()
                labels[:, : item.first] = -100
                with torch.no_grad():
                    total += float(net(input_ids=ids, labels=labels).loss) * item.counted
                count += item.counted
        means.append(total / count)
    return sum(means) / len(means)


STATIC: dict[str, dict[str, Any]] = {
    "uniform soup": {"merge_method": "soup", "models": ["a", "b"], "base_model": "base"},
    "base": {"merge_method": "soup", "models": ["base"]},
    "source b": {"merge_method": "soup", "models": ["b"], "base_model": "base"},
    "task arithmetic 0.3": {
        "merge_method": "task_arithmetic", "models": ["a", "b"], "base_model": "base",
        "parameters": {"lambda": 0.3},
    },
    "fisher": {"merge_method": "fisher", "base_model": "base",
               "models": [{"model": n, "data": {"files": f"{n}.jsonl", "part": "train"}}
                          for n in NAMES], "statistics": QUICK["statistics"]},
}  # fmt: skip


def test_the_best_of_the_ladder_is_merged(models: Path, tmp_path: Path) -> None:
    recipe = write_recipe(models)
    auto = run(recipe, tmp_path / "out")
    losses = {line["step"]: line["loss"] for line in auto["path"]}
    assert {"fisher", "regmean", "dam", "base", "source a", "task arithmetic 1"} < set(losses)
    finals = {line["step"]: line["final_loss"] for line in auto["path"] if "final_loss" in line}
    assert sorted(losses[name] for name in finals) == sorted(losses.values())[:3]
    assert auto["best"] in finals
    assert auto["ended"] == "every step is done"
    # The model on disk is the one that was measured in memory.
    best = loss_of(tmp_path / "out", recipe, "validation")
    assert best == pytest.approx(losses[auto["best"]], abs=1e-5)
    test = loss_of(tmp_path / "out", recipe, "test")
    assert test == pytest.approx(auto["verdict"]["loss"][auto["best"]], abs=1e-5)
    for number, (name, document) in enumerate(STATIC.items()):
        path = models / f"static{number}.yaml"
        path.write_text(yaml.safe_dump(document))
        out = tmp_path / f"static{number}"
        merge_cli.merge(path, out, options=OPTIONS)
        assert loss_of(out, recipe, "validation") == pytest.approx(losses[name], abs=1e-5), name
    kept = [line["loss"] for line in auto["path"] if line["kept"]]
    assert kept == sorted(kept, reverse=True)
    page = (tmp_path / "out" / "merge_report.html").read_text()
    assert "The path" in page
    assert "paired bootstrap" in page
    assert not (tmp_path / "out.auto").exists()


@pytest.mark.parametrize("method", ["fisher", "regmean", "search", "dam", "soup"])
def test_the_resolved_recipe_gives_the_same_bytes(
    method: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever method wins."""
    step = "uniform soup" if method == "soup" else method
    monkeypatch.setattr("merge_cli.auto.run.mean_loss", _favouring(step))
    monkeypatch.setattr("merge_cli.auto.verdict._FINALISTS", 1)
    training = {**QUICK["training"], "start": "regmean", "keep": "last"}  # a whole merge, in OUT
    recipe = write_recipe(models, f"{method}.yaml", methods=[method], training=training)
    auto = run(recipe, tmp_path / "out")
    assert auto["best"] == step
    assert (tmp_path / "out" / "start").exists() == (method == "dam")
    resolved = tmp_path / "out" / "merge_recipe.yaml"
    merged_by = {"search": "task_arithmetic"}.get(method, method)
    assert yaml.safe_load(resolved.read_text())["merge_method"] == merged_by
    assert (tmp_path / "out" / "statistics").exists() == (method in ("fisher", "regmean"))
    # No data, no cache, and both folders elsewhere.
    assert "data" not in resolved.read_text().partition("metadata:")[0]
    monkeypatch.setenv("MERGE_CLI_CACHE", str(tmp_path / "empty"))
    moved = tmp_path / "moved"
    shutil.copytree(tmp_path / "out", moved)
    shutil.rmtree(tmp_path / "out")
    merge_cli.merge(moved / "merge_recipe.yaml", tmp_path / "again", options=OPTIONS)
    assert weights(tmp_path / "again") == weights(moved)


def test_a_stage_that_chose_statistics_brings_them(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("merge_cli.auto.run.mean_loss", _favouring("fisher"))
    monkeypatch.setattr("merge_cli.auto.verdict._FINALISTS", 1)
    first = yaml.safe_load(write_recipe(models, "stage.yaml", methods=["fisher"]).read_text())
    second = {"merge_method": "soup", "models": ["best", "base"]}
    recipe = models / "two.yaml"
    recipe.write_text(yaml.safe_dump_all([{**first, "name": "best"}, second]))
    merge_cli.merge(recipe, tmp_path / "out", options=OPTIONS)
    resolved = tmp_path / "out" / "merge_recipe.yaml"
    documents = list(yaml.safe_load_all(resolved.read_text()))
    assert documents[0]["statistics"] == "./stages/best/statistics"
    monkeypatch.setenv("MERGE_CLI_CACHE", str(tmp_path / "empty"))
    merge_cli.merge(resolved, tmp_path / "again", options=OPTIONS)
    assert weights(tmp_path / "again") == weights(tmp_path / "out")


@pytest.mark.parametrize("change", ["data", "methods", "statistics"])
def test_a_stage_of_other_data_or_settings_is_made_again(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """Whatever a preparation goes by is part of the stage's work."""
    monkeypatch.setattr("merge_cli.auto.run.mean_loss", _favouring("fisher"))
    monkeypatch.setattr("merge_cli.auto.verdict._FINALISTS", 1)
    folder = tmp_path / "models"
    shutil.copytree(models, folder)
    recipe = folder / "two.yaml"

    def run_both() -> list[str]:
        first = yaml.safe_load(write_recipe(folder, "stage.yaml", **keys).read_text())
        last = {"merge_method": "soup", "models": ["best", "base"]}
        recipe.write_text(yaml.safe_dump_all([{**first, "name": "best"}, last]))
        said: list[str] = []
        merge_cli.merge(
            recipe, tmp_path / "out", options=replace(OPTIONS, keep_stages=True, overwrite=True),
            on_progress=lambda p: said.append(p.note),
        )  # fmt: skip
        return [note for note in said if note.startswith("stage 1")]

    keys: dict[str, Any] = {"methods": ["fisher"]}
    assert run_both() == ["stage 1 of 1: best"]
    assert run_both() == ["stage 1 of 1: best: made before"]
    if change == "data":
        rows = (folder / "a.jsonl").read_text().splitlines(keepends=True)
        (folder / "a.jsonl").write_text("".join(rows[:-1]))
    elif change == "methods":
        keys["methods"] = ["fisher", "soup"]
    else:
        keys["statistics"] = {"examples": 7, "max_length": 24}
    assert run_both() == ["stage 1 of 1: best"]


def test_a_merge_is_kept_where_its_statistics_could_not_be_copied(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full: a sentence, and the same command goes on behind the merge."""
    monkeypatch.setattr("merge_cli.auto.run.mean_loss", _favouring("fisher"))
    monkeypatch.setattr("merge_cli.auto.verdict._FINALISTS", 1)
    recipe = write_recipe(models, "full.yaml", methods=["fisher"])
    real = shutil.copytree

    def full(source: Path, target: Path, **more: Any) -> Path:
        real(source, target, **more)
        raise shutil.Error([(str(source), str(target), "[Errno 28] No space left on device")])

    with monkeypatch.context() as patched:
        patched.setattr("merge_cli.report.stages.shutil.copytree", full)
        with pytest.raises(ResourceError, match="the disk is full"):
            run(recipe, tmp_path / "out")
    said: list[str] = []
    merge_cli.merge(
        recipe, tmp_path / "out", options=OPTIONS, on_progress=lambda p: said.append(p.note)
    )
    assert "resumed" in said
    assert not any("starting over" in note for note in said)


def _favouring(step: str) -> Any:
    """A mean loss that is lowest for the last step, or for the first one."""
    calls = iter(range(10_000))
    return lambda losses: float(next(calls)) if step == "uniform soup" else -float(next(calls))


def test_a_search_begins_at_the_best_and_finds_better() -> None:
    def loss(weights: Weights) -> float:
        if weights[0] > 0.9:
            return math.nan  # such a merge predicts no numbers
        return (weights[0] - 0.6) ** 2 + (weights[1] - 0.1) ** 2

    def searched() -> tuple[Weights, list[Weights]]:
        search, tried = WeightSearch((0.3, 0.3), 0), []
        while search.generation:
            tried += search.generation
            search.tell([loss(weights) for weights in search.generation])
        return search.best, tried

    best, tried = searched()
    assert tried[0] == (0.3, 0.3)
    assert len(tried) == candidate_count(2)
    assert loss(best) == min(value for value in map(loss, tried) if not math.isnan(value)) < 0.02
    assert all(-0.25 <= weight <= 1.25 for weights in tried for weight in weights)
    assert searched() == (best, tried)


@dataclass
class InMemory:
    """A search's journal."""

    lines: list[dict[str, Any]]

    def append(self, line: dict[str, Any]) -> None:
        self.lines.append(line)


@settings(deadline=None, max_examples=20)
@given(st.randoms(use_true_random=False), st.integers(0, 40))
def test_candidates_in_any_order_and_after_a_stop(random: Random, stop: int) -> None:
    """Several workers, and a run that was stopped, come to the same weights as one worker."""

    def loss(weights: Weights) -> float:
        return abs(weights[0] - 0.5) + abs(weights[1] - 0.2)

    def searched(workers: int, lines: list[dict[str, Any]], most: int = 1000) -> Weights | None:
        search = CandidateSearch((0.3, 0.3), 0, InMemory(lines), ignore_progress)
        busy: list[Weights] = []
        for _ in range(most):
            while len(busy) < workers and (weights := search.next()) is not None:
                busy.append(weights)
            if search.ended:
                assert not busy
                return search.best
            weights = busy.pop(random.randrange(len(busy)))
            search.take(weights, loss(weights), {})
        return None

    straight: list[dict[str, Any]] = []
    best = searched(1, straight)
    stopped: list[dict[str, Any]] = []
    searched(3, stopped, stop)
    assert searched(2, stopped) == best
    tried = [[tuple(line["weights"]) for line in lines] for lines in (straight, stopped)]
    assert sorted(tried[0]) == sorted(tried[1])  # nothing is measured twice


def test_the_best_few_are_measured_on_more_rows(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a few rows prefer by chance does not win."""
    monkeypatch.setattr("merge_cli.auto.rows.VALIDATION_TOKENS", 40)
    auto = run(write_recipe(models, methods=["task_arithmetic"]), tmp_path / "out")
    few = [line for line in auto["path"] if "final_loss" in line]
    lowest = sorted(line["loss"] for line in auto["path"])[:3]
    assert sorted(line["loss"] for line in few) == lowest
    best = next(line for line in few if line["step"] == auto["best"])
    assert auto["cost"]["final_tokens"] > 0
    loss = loss_of(tmp_path / "out", write_recipe(models), "final")
    assert loss == pytest.approx(best["final_loss"], abs=1e-5)


class Stop:
    """Presses Ctrl-C when a step is done, or in the middle of one."""

    def __init__(self, step: str) -> None:
        self.step = step

    def __call__(self, progress: Progress) -> None:
        done = progress.stage == "auto" and progress.note.startswith(f"{self.step}:")
        if done or progress.stage == self.step:
            raise KeyboardInterrupt


def test_the_lowest_loss_on_all_validation_rows_wins() -> None:
    """However small the lead: two of the four are dearer, and the first rows preferred another."""
    final = {"soup": 2.2, "fisher": 2.001, "search": 2.1, "dam": 2.0}

    def rows(names: Sequence[str]) -> dict[str, Losses]:
        return {
            name: {"a": Metric("a", "nats per token", "lower", [final[name]] * 8, [1.0] * 8)}
            for name in names
        }

    lines = [
        {"step": name, "loss": loss}
        for name, loss in (("soup", 2.3), ("fisher", 1.9), ("search", 2.0), ("dam", 1.95))
    ]
    assert choose(lines, rows)["step"] == "dam"
    assert [line["step"] for line in lines if "final_loss" in line] == ["fisher", "search", "dam"]


@pytest.mark.parametrize("methods", [None, ["soup", "regmean", "dam"], ["soup", "dam"]])
def test_learning_starts_at_the_best_so_far(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, methods: list[str] | None
) -> None:
    """Nothing that was measured or gathered for an earlier step is measured or gathered again."""
    started: list[Recipe] = []

    def told(plan: Plan, *arguments: Any, **options: Any) -> Any:
        started.append(plan.recipe)
        return learn(plan, *arguments, **options)

    monkeypatch.setattr("merge_cli.auto.worker.learn", told)
    recipe, lines = write_recipe(models, methods=methods), list[Progress]()
    auto = run(recipe, tmp_path / "out", on_progress=lines.append)
    (learning,) = started
    assert learning.training is not None
    if methods == ["soup", "dam"]:  # nothing was tried that is no sum of sources
        assert learning.training.start == "best"
        return
    starts = {"uniform soup": "soup", "base": 0.0, "fisher": "fisher", "regmean": "regmean"}
    starts |= {f"task arithmetic {scale:g}": scale for scale in LAMBDAS}
    losses = {line["step"]: line["loss"] for line in auto["path"] if line["step"] in starts}
    assert learning.training.start == starts[min(losses, key=lambda name: losses[name])]
    assert not learning.training.baselines
    at_learning = next(i for i, line in enumerate(lines) if line.stage == "teach")
    assert "gather" not in {line.stage for line in lines[at_learning:]}
    assert {line.note for line in lines if line.stage == "baselines"} <= {"fisher", "regmean"}


def test_learning_stays_where_it_began(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A larger budget afterwards tries Fisher, which was left out, and learns nothing anew."""
    started: list[Any] = []

    def told(plan: Plan, *arguments: Any, **options: Any) -> Any:
        started.append(plan.recipe.learning.start)
        return learn(plan, *arguments, **options)

    def stop(progress: Progress) -> None:
        if progress.note.startswith("test rows"):
            raise KeyboardInterrupt

    take = Trials.take

    def taken(trials: Trials, job: Job, answer: Answer, loss: float) -> None:
        take(trials, job, answer, 0.1 if job.step == "fisher" else loss)

    monkeypatch.setattr("merge_cli.auto.worker.learn", told)
    monkeypatch.setattr(Trials, "take", taken)  # so that learning would begin at Fisher
    keys: dict[str, Any] = {"methods": ["soup", "fisher", "dam"]}
    keys["statistics"] = {"examples": 60, "max_length": 24}
    decided = plan_automatic(make_plan(load_recipe(write_recipe(models, **keys))), OPTIONS)
    tokens = {step.name: step.tokens for step in decided.steps}
    assert tokens["fisher"] > tokens["dam"] > 0
    enough = len(decided.steps) * decided.validation_tokens + tokens["dam"]
    with pytest.raises(Interrupted):
        run(write_recipe(models, **keys, budget={"tokens": enough}), tmp_path / "out",
            on_progress=stop)  # fmt: skip
    auto = run(write_recipe(models, **keys), tmp_path / "out")
    assert any(line["step"] == "fisher" and not line["note"] for line in auto["path"])
    assert len(started) > 1  # for the verdict, from what it had learned
    assert len(set(started)) == 1
    assert started[0] != "fisher"


def test_a_start_that_is_asked_for_is_taken(models: Path) -> None:
    for training in ({"start": "soup"}, {"form": "soup"}, {"baselines": False, "start": 0.3}):
        recipe = load_recipe(write_recipe(models, training={**QUICK["training"], **training}))
        (dam,) = [s for s in plan_automatic(make_plan(recipe), OPTIONS).steps if s.method == "dam"]
        assert dam.recipe.training == recipe.training
        assert not dam.begins_at_best


SOME: dict[str, Any] = {"methods": ["soup", "fisher", "search", "dam"]}


@pytest.fixture(scope="module")
def unstopped(models: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A run that nobody stops, with a cache of its own."""
    folder = tmp_path_factory.mktemp("unstopped")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MERGE_CLI_CACHE", str(folder / "cache"))
        return folder / "out", run(write_recipe(models, **SOME), folder / "out")


@pytest.mark.parametrize("step", ["source a", "gather", "fisher", "search", "train", "dam"])
def test_a_stopped_run_continues(
    step: str,
    models: Path,
    unstopped: tuple[Path, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MERGE_CLI_CACHE", str(tmp_path / "cache"))
    recipe = write_recipe(models, **SOME)
    out, straight = unstopped
    with pytest.raises(Interrupted, match="the best so far is"):
        run(recipe, tmp_path / "out", on_progress=Stop(step))
    again: list[str] = []
    auto = run(recipe, tmp_path / "out", on_progress=lambda p: again.append(p.stage))
    assert [(line["step"], line["loss"], line["kept"]) for line in auto["path"]] == [
        (line["step"], line["loss"], line["kept"]) for line in straight["path"]
    ]
    assert auto["verdict"] == straight["verdict"]
    assert weights(tmp_path / "out") == weights(out)
    if step == "dam":
        assert not {"gather", "teach", "train"} & set(again)  # nothing is done twice


@pytest.mark.parametrize("when", ["at once", "later"])
def test_the_best_so_far_can_be_accepted(when: str, models: Path, tmp_path: Path) -> None:
    """Ctrl-C publishes it; or the next run does, and tries nothing more."""
    recipe, accept = write_recipe(models, **SOME), replace(OPTIONS, accept_best=True)
    out = tmp_path / "out"
    if when == "later":
        with pytest.raises(Interrupted, match="best so far is"):
            run(recipe, out, on_progress=Stop("train"))
        result = merge_cli.merge(recipe, out, options=accept)
    else:
        result = merge_cli.merge(recipe, out, options=accept, on_progress=Stop("train"))
    auto = result.report["auto"]
    assert auto["ended"] == "it was stopped, and the best so far accepted"
    dam = auto["path"][-1]
    assert (dam["step"], dam["loss"]) == ("dam", None)
    assert "accepted" in dam["note"]
    assert auto["best"] != "dam"
    merge_cli.merge(out / "merge_recipe.yaml", tmp_path / "again", options=OPTIONS)
    assert weights(tmp_path / "again") == weights(out)
    assert not (tmp_path / "out.auto").exists()


def test_there_must_be_a_best_to_accept(models: Path, tmp_path: Path) -> None:
    """Stopped before anything was measured, there is nothing to publish."""
    options = replace(OPTIONS, accept_best=True)
    with pytest.raises(Interrupted):
        merge_cli.merge(
            write_recipe(models), tmp_path / "out", options=options, on_progress=Stop("auto")
        )
    plain = models / "soup.yaml"
    plain.write_text(yaml.safe_dump({"merge_method": "soup", "models": ["a", "b"]}))
    with pytest.raises(merge_cli.errors.UsageError, match="is for `merge_method: auto`"):
        merge_cli.merge(plain, tmp_path / "out", options=options)


def test_another_recipe_does_not_continue_it(models: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run(write_recipe(models), tmp_path / "out", on_progress=Stop("base"))
    other = write_recipe(models, "other.yaml", dtype="bfloat16")
    with pytest.raises(merge_cli.errors.UsageError, match="interrupted automatic merge"):
        run(other, tmp_path / "out")
    # A larger budget is the same work.
    run(write_recipe(models, budget={"tokens": 0}), tmp_path / "out")


def test_a_budget_of_nothing_is_the_soup(models: Path, tmp_path: Path) -> None:
    for number, budget in enumerate(({"tokens": 0}, {"minutes": 0})):
        out = tmp_path / str(number)
        auto = run(write_recipe(models, budget=budget), out)
        assert auto["best"] == "uniform soup"
        assert auto["ended"].startswith("the budget is spent; left out: base, ")
        left_out = [line for line in auto["path"] if line["loss"] is None]
        assert len(left_out) == len(auto["path"]) - 1
        assert all("are left" in line["note"] for line in left_out)
        assert auto["verdict"]["better"] is False


def test_a_budget_leaves_out_what_it_does_not_pay(models: Path, tmp_path: Path) -> None:
    recipe = write_recipe(models, methods=["soup", "fisher", "dam"])
    decided = plan_automatic(make_plan(load_recipe(recipe)), OPTIONS)
    *others, dam = decided.steps
    tokens = sum(step.tokens + decided.validation_tokens for step in others)
    limited = write_recipe(models, methods=["soup", "fisher", "dam"], budget={"tokens": tokens})
    auto = run(limited, tmp_path / "out")
    assert auto["cost"]["tokens"] == tokens
    assert auto["ended"] == "the budget is spent; left out: dam"
    assert auto["path"][-1]["step"] == dam.name
    assert auto["path"][-1]["loss"] is None


def test_methods_restrict_it(models: Path, tmp_path: Path) -> None:
    auto = run(write_recipe(models, methods=["regmean"]), tmp_path / "out")
    steps = [line["step"] for line in auto["path"]]
    assert steps == ["uniform soup", "base", "source a", "source b", "regmean"]


def test_without_a_base(models: Path, tmp_path: Path) -> None:
    recipe = write_recipe(models, base_model=None, methods=["soup", "fisher"])
    auto = run(recipe, tmp_path / "out")
    steps = [line["step"] for line in auto["path"]]
    assert steps == ["uniform soup", "source a", "source b", "fisher"]
    recipe = write_recipe(models, base_model=None, methods=["search"])
    assert run(recipe, tmp_path / "searched")["path"][-1]["step"] == "search"


def test_improvement_can_be_required(models: Path, tmp_path: Path) -> None:
    recipe = write_recipe(models, budget={"tokens": 0})
    with pytest.raises(GateError, match="improvement is required"):
        run(recipe, tmp_path / "out", require_improvement=True)
    assert not (tmp_path / "out").exists()


def test_a_merge_without_numbers_is_not_chosen(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = iter([math.nan, 2.0] + [3.0] * 50)
    for room in ("run", "verdict"):
        monkeypatch.setattr(f"merge_cli.auto.{room}.mean_loss", lambda losses: next(values))
    auto = run(write_recipe(models, methods=["soup"]), tmp_path / "out")
    assert auto["path"][0]["note"] == "it predicts NaN or Inf"
    assert auto["best"] == "base"


def test_rows_are_divided_by_what_they_say(models: Path, tmp_path: Path) -> None:
    """One part for each row, wherever it stands, and in whatever order."""
    lines = (models / "a.jsonl").read_text().splitlines()
    for name, listed in (("x", lines[:40]), ("y", [*reversed(lines)] * 2)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(listed) + "\n")
    parts: dict[str, set[bytes]] = {}
    for part in ("train", "validation", "test"):
        of_both: set[bytes] = set()
        for name in ("x", "y"):
            path = tmp_path / f"{name}.jsonl"
            data = Data(files=(str(path),), part=part)
            rows = read_data(data, [path])
            assert all(part_of(row) == part for row in rows)
            of_both |= {content_of(row) for row in rows}
        parts[part] = of_both
    assert sum(map(len, parts.values())) == len(set().union(*parts.values())) == 100
    assert 4 <= len(parts["validation"]) <= 16
    assert 4 <= len(parts["test"]) <= 16


def test_a_row_of_two_sources_is_measured_once(models: Path, tmp_path: Path) -> None:
    both = tmp_path / "both.jsonl"
    both.write_text((models / "a.jsonl").read_text() + (models / "b.jsonl").read_text())
    listed = [{"model": "a", "data": "a.jsonl"}, {"model": "b", "data": str(both)}]
    decided = plan_automatic(make_plan(load_recipe(write_recipe(models, models=listed))), OPTIONS)
    plain = plan_automatic(make_plan(load_recipe(write_recipe(models))), OPTIONS)
    for shared, alone in zip(decided.parts, plain.parts, strict=True):
        assert shared.validation == alone.validation
        assert shared.test == alone.test


def refused(recipe: Path) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe)
    return "\n".join(map(str, caught.value.problems))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"methods": ["fischer"]}, "'fischer' is no method that auto tries (item 1). Did you mean"),
        ({"models": ["a", {"model": "b", "data": "b.jsonl"}]}, "models[0]: has no `data:`"),
        ({"budget": {"minutes": -1}}, "budget.minutes: must be at least 0"),
        ({"budget": {"hours": 1}}, "budget.hours: unknown key"),
        ({"budget": {}}, "give minutes, tokens, or both"),
        ({"parameters": {"weight": 1}}, "auto chooses the method and its numbers by itself"),
        ({"objective": [{"task": "loss", "data": "a.jsonl"}]}, "has no effect in auto"),
        ({"out_dtype": "fp8"}, "not in fp8"),
        ({"base_model": None, "methods": ["task_arithmetic"]}, "the recipe names none"),
        ({"merge_method": "soup", "training": None, "statistics": None, "budget": {"minutes": 1},
          "models": ["a", "b"]}, "soup tries no other methods"),
        ({"models": [{"model": "a", "data": {"files": "a.jsonl", "held_out": "b.jsonl"}}]},
         "divides the rows itself"),
    ],
)  # fmt: skip
def test_refusals(keys: Mapping[str, Any], words: str, models: Path) -> None:
    assert words in refused(write_recipe(models, "refused.yaml", **keys))


def test_too_few_rows(models: Path) -> None:
    lines = (models / "a.jsonl").read_text().splitlines()[:10]
    (models / "few.jsonl").write_text("\n".join(lines * 9) + "\n")  # repeated, they are no more
    listed = [{"model": "a", "data": "few.jsonl"}, {"model": "b", "data": "b.jsonl"}]
    plan = make_plan(load_recipe(write_recipe(models, "few.yaml", models=listed)))
    with pytest.raises(SourceError, match="has too few different rows") as caught:
        plan_automatic(plan, OPTIONS)
    assert "100 rows or more" in str(caught.value)


def test_the_plan_and_the_options_are_shown(models: Path) -> None:
    plan = make_plan(load_recipe(write_recipe(models)))
    (preparation,) = preparations_of(plan)
    shown = preparation.plan_json(preparation.plan(plan, OPTIONS))
    assert [step["step"] for step in shown["steps"]][-3:] == ["regmean", "search", "dam"]
    assert json.dumps(shown)
    options = preparation.options_json(get_method("auto"))
    assert set(options["budget"]) == {"minutes", "tokens"}


def test_the_journal_survives_a_torn_line(models: Path, tmp_path: Path) -> None:
    recipe = write_recipe(models, methods=["soup"])
    with pytest.raises(Interrupted):
        run(recipe, tmp_path / "out", on_progress=Stop("source a"))
    decided = plan_automatic(make_plan(load_recipe(recipe)), OPTIONS)
    folder = AutomaticWorkspace(tmp_path / "out", decided.key, fresh=False)
    journal = folder.journal
    journal.write_bytes(journal.read_bytes()[:-20])
    assert run(recipe, tmp_path / "out")["ended"] == "every step is done"
