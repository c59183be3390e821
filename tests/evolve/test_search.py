"""Searching: candidates are what the engine writes, a journal is all the state there is."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any, cast

import pytest
import torch
import yaml

import merge_cli
from merge_cli.checkpoint.headers import TensorRef
from merge_cli.comparison.cost import CostLog
from merge_cli.engine import in_memory as merger
from merge_cli.engine import in_memory as resident
from merge_cli.engine import residency as residency_module
from merge_cli.errors import (
    CorruptFileError,
    GateError,
    Interrupted,
    MergeCliError,
    MismatchError,
    RecipeError,
    SourceError,
    UsageError,
)
from merge_cli.evaluation import run as evaluation_run
from merge_cli.evaluation.live import load
from merge_cli.evaluation.result import Metric
from merge_cli.evaluation.run import evaluate_source
from merge_cli.evaluation.spec import EvalSpec
from merge_cli.evolve import evaluator as evaluator_module
from merge_cli.evolve import mergeable as mergeable_module
from merge_cli.evolve.defaults import DEFAULT_RANGES
from merge_cli.evolve.journal import SearchWorkspace
from merge_cli.evolve.loop import Loop
from merge_cli.evolve.mergeable import MergeableModel
from merge_cli.evolve.objectives import Goal, Split, Value, parse_objective
from merge_cli.evolve.optimizers import make_optimizer
from merge_cli.evolve.plan import plan_search
from merge_cli.evolve.record import gate, paired_interval
from merge_cli.evolve.space import Space
from merge_cli.evolve.static import soup_start
from merge_cli.options import MergeOptions
from merge_cli.planning.planner import load_recipe, make_plan
from merge_cli.recipe.reference import ModelRef
from merge_cli.sources.opening import open_source
from merge_cli.system.records import seal, unseal
from merge_cli.system.workspace import MARK
from tests.support.devices import StrictTransfers
from tests.support.evolve_tiny import (
    OPTIONS,
    journal,
    merge,
    run_search,
    write_family,
    write_search,
)
from tests.support.paths import ROOT


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The family, written once; tests work in folders that link to it."""
    return write_family(tmp_path_factory.mktemp("family"))


@pytest.fixture
def folder(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MERGE_CLI_CACHE", str(tmp_path / "cache"))
    for path in models.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


# Candidates and the engine

STATIC: dict[str, dict[str, Any]] = {
    "soup": {"models": [{"model": "a", "parameters": {"weight": 0.3}}, {"model": "b"}]},
    "task_arithmetic": {"parameters": {"lambda": [0.2, 0.9]}},
    "ties": {"parameters": {"density": 0.3, "lambda": 0.7}},
    "ties model": {"parameters": {"semantics": "paper"}},
    "dare": {"parameters": {"density": 0.4, "rescale": "l1"}},
    "dare_ties": {"parameters": {"density": [{"filter": "mlp", "value": 0.2}, {"value": 0.6}]}},
    "slerp": {"models": ["base", "a"], "parameters": {"t": [0.1, 0.8]}},
    "passthrough": {"models": ["a"], "parameters": {"scale": [{"filter": "norm", "value": 0.5},
                                                              {"value": 1.0}]}},
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_candidate_has_the_weights_that_the_engine_writes(folder: Path, dtype: str) -> None:
    recipes = {}
    for name, keys in STATIC.items():
        models = [m if isinstance(m, dict) else {"model": m}
                  for m in keys.get("models", ["a", "b", "c"])]  # fmt: skip
        document = {**keys, "merge_method": name.partition(" ")[0], "base_model": "base",
                    "models": models, "dtype": dtype, "seed": 5}  # fmt: skip
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(document))
        recipes[name] = load_recipe(path)
    live = MergeableModel(recipes["ties"], OPTIONS, device="cpu")
    try:
        for name in [*recipes, *reversed(recipes)]:  # twice: from remembered thresholds, too
            live.become(recipes[name])
            out = folder / f"{name} out"
            if not out.exists():
                merge_cli.merge(recipes[name], out, options=OPTIONS)
            disk = load(open_source(ModelRef(str(out)), folder), device="cpu")
            ours = dict(live.live.net.named_parameters())
            theirs = dict(disk.net.named_parameters())
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
    finally:
        live.close()


@pytest.mark.parametrize("residency", ["device", "disk"])
def test_where_the_sources_wait_changes_no_bit(
    folder: Path, residency: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device is played by host memory; the lanes are its own."""
    made: list[resident.InMemoryWorker] = []

    def lanes(files: resident.InMemoryFiles, device: Any, block: int) -> Any:
        def lane(number: int) -> resident.InMemoryWorker:
            made.append(resident.InMemoryWorker(files, StrictTransfers(), 256))
            return made[-1]

        return lane

    chosen = residency_module.SourceResidency(cast(Any, residency), "for the test", 0)
    monkeypatch.setattr(mergeable_module, "choose_residency", lambda *about, **more: chosen)
    monkeypatch.setattr(merger, "in_memory_workers", lanes)
    if residency == "device":
        monkeypatch.setattr(merger, "arithmetic_for", lambda *about: ("torch", ""))
    recipes = []
    for name in ("ties", "dare", "slerp", "passthrough"):
        keys = dict(STATIC[name])
        models = [{"model": m} for m in keys.pop("models", ["a", "b", "c"])]
        path = folder / f"{name}.yaml"
        document = {**keys, "merge_method": name, "base_model": "base", "models": models,
                    "dtype": "bfloat16", "seed": 5}  # fmt: skip
        path.write_text(yaml.safe_dump(document))
        recipes.append(load_recipe(path))
    live = MergeableModel(recipes[0], replace(OPTIONS, threads=2), device="cpu")
    try:
        for number, recipe in enumerate([*recipes, *recipes]):  # nothing that waits is spoiled
            live.become(recipe)
            out = folder / f"{recipe.merge_method} out"
            if not out.exists():
                merge_cli.merge(recipe, out, options=OPTIONS)
            disk = load(open_source(ModelRef(str(out)), folder), device="cpu")
            theirs = dict(disk.net.named_parameters())
            ours = dict(live.live.net.named_parameters())
            assert all(torch.equal(ours[key], theirs[key]) for key in ours), (number, recipe)
    finally:
        live.close()
    assert bool(made) == (residency == "device")


@pytest.mark.cuda
def test_candidates_on_a_gpu_are_what_it_writes(folder: Path) -> None:
    recipe = folder / "r.yaml"
    recipe.write_text(
        "merge_method: dare_ties\nbase_model: base\nmodels: [{model: a}, {model: b}]\n"
        "parameters: {density: 0.5}\ndtype: bfloat16\n"
    )
    options = MergeOptions(device="cuda:0")
    live = MergeableModel(load_recipe(recipe), options, device="cuda:0")
    assert live.residency.residency == "device"
    live.become(load_recipe(recipe))
    merge_cli.merge(recipe, folder / "out", options=options)
    disk = load(open_source(ModelRef(str(folder / "out")), folder), device="cuda:0")
    theirs = dict(disk.net.named_parameters())
    ours = dict(live.live.net.named_parameters())
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    live.close()


def test_what_fits_decides_where_the_sources_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    ref = TensorRef("w", Path("f"), "BF16", (1000,), 0, 2000)
    size = residency_module.stored_bytes([ref, ref])
    free = {"cuda": 10_000, "cpu": 100_000}
    monkeypatch.setattr(residency_module, "free_memory", lambda kind, indexes: free[kind])
    cuda, cpu = 0, None

    def where(device: int | None, workers: int = 1, model: int = 2000) -> str:
        return residency_module.choose_residency(
            size, device, on_device=model, workers=workers
        ).residency

    assert where(cuda) == "device"
    assert where(cuda, workers=2) == "host"
    assert where(cuda, model=5000) == "host"
    assert where(cpu) == "host"
    free["cpu"] = 3000
    assert where(cpu) == "disk"
    assert where(cuda, model=5000) == "disk"


def test_what_does_not_change_is_not_merged_again(folder: Path) -> None:
    recipe = folder / "r.yaml"
    text = (
        "merge_method: ties\nbase_model: base\nmodels: [{{model: a}}, {{model: b}}]\nparameters:\n"
        "  density: 0.5\n  lambda: [{{filter: mlp, value: {}}}, {{value: 1}}]\n"
    )
    recipe.write_text(text.format(0.5))
    live = MergeableModel(load_recipe(recipe), OPTIONS, device="cpu")
    live.become(load_recipe(recipe))
    whole = live.rewritten
    live.become(load_recipe(recipe))
    assert live.rewritten == whole
    recipe.write_text(text.format(0.6))
    live.become(load_recipe(recipe))
    assert live.rewritten - whole == 6  # gate, up and down of two layers
    live.close()


def test_evaluating_the_merge_from_disk_gives_the_journaled_score(folder: Path) -> None:
    recipe = write_search(folder, {"method": "dare_ties", "parameters": {
        "weight": {"min": 0, "max": 1.5}, "density": {"min": 0.2, "max": 1}}, "layer_groups": 2,
        "evaluations": 6})  # fmt: skip
    result = merge(recipe, folder / "out")
    lines = journal(folder / "out" / "search_journal.jsonl")
    searched = "static" if result.report["search"]["best"]["static"] else "candidate"
    best = result.report["search"]["best"]
    assert not (folder / "out.search").exists()
    plan = make_plan(load_recipe(recipe))
    objective = plan_search(plan, OPTIONS).objective
    source = open_source(ModelRef(str(folder / "out")), folder)
    for kind, split in ((searched, "search"), ("validation", "validation"), ("report", "test")):
        own = [line for line in lines[1:] if line["kind"] == kind]
        wanted = ("merge", "found") if kind == "report" else ("number", best["number"])
        line = next(line for line in own if line[wanted[0]] == wanted[1])
        found = evaluate_source(source, objective.splits[split].spec)  # type: ignore[index]
        for name, task in found.tasks.items():
            assert line["values"][name]["loss"] == [task.value, "lower"]
    # The plain recipe, and the resolved one, merge to the same bytes without a search.
    for name in ("best_recipe.yaml", "merge_recipe.yaml"):
        again = merge(folder / "out" / name, folder / f"again {name}")
        assert "search" not in again.report
        weights = (again.path / "model.safetensors").read_bytes()
        assert weights == (folder / "out" / "model.safetensors").read_bytes()
    page = (folder / "out" / "merge_report.html").read_text()
    for title in ("Convergence", "Pareto front", "What was found", "What searching cost"):
        assert f"<h2>{title}</h2>" in page
    cost = CostLog(folder / "costs.jsonl").cost("out", folder / "out")
    own = [line for line in lines[1:] if line["kind"] in ("static", "candidate", "validation")]
    assert cost.tokens == sum(line["tokens"] for line in own) > 0
    assert cost.forward_passes == sum(line["passes"] for line in own) > 0


def test_tasks_of_any_kind_give_the_same_from_disk(folder: Path) -> None:
    (folder / "own.py").write_text(
        "import torch\n"
        "def peak(net, tokenizer):\n"
        "    ids = torch.tensor([tokenizer.encode('a search')])\n"
        "    return [float(net(input_ids=ids).logits.max()), 1.0]\n"
    )
    tasks = [
        {"task": "kl", "data": "a.search.jsonl", "teacher": "a", "metric": "agreement"},
        {"task": "kl", "data": "b.search.jsonl", "teacher": "b", "weight": 2},
        {"python": "own.py:peak", "goal": "max", "weight": 0.1},
    ]
    recipe = write_search(folder, {"evaluations": 3, "population": 3}, objective=tasks)
    result = merge(recipe, folder / "out")
    best = result.report["search"]["best"]["number"]
    lines = journal(folder / "out" / "search_journal.jsonl")
    line = next(
        x for x in lines[1:] if x["kind"] in ("static", "candidate") and x["number"] == best
    )
    objective = plan_search(make_plan(load_recipe(recipe)), OPTIONS).objective
    source = open_source(ModelRef(str(folder / "out")), folder)
    found = evaluate_source(source, objective.search.spec)
    said = {name: {m: v[0] for m, v in metrics.items()} for name, metrics in line["values"].items()}
    assert said == {name: {m.name: m.value for m in task.metrics.values()}
                    for name, task in found.tasks.items()}  # fmt: skip
    whole = (-said["a"]["agreement"] + 2 * said["b"]["kl"] - 0.1 * said["python"]["score"]) / 3.1
    assert result.report["search"]["best"]["score"] == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize(
    ("section", "in_space"),
    [
        ({"parameters": {"weight": {"min": 0, "max": 1}}}, 14),
        ({"parameters": {"weight": {"min": 0, "max": 0.5}}}, 7),  # neither parents nor 0.6 to 1
        ({"parameters": {"lambda": {"min": 0, "max": 1}}}, 12),  # not the parents
        ({"method": "dare", "layer_groups": 2, "filters": ["mlp"], "parameters": {
            "weight": {"min": 0, "max": 1}, "density": {"min": 0.1, "max": 1}}}, 14),
        ({"method": "ties", "parameters": {"weight": {"min": 0, "max": 1}}}, 0),
        ({"method": "soup", "parameters": {"weight": {"min": 0, "max": 1}}}, 4),  # 0.5 is the soup
        ({"method": ["ties", "task_arithmetic"]}, 14),
    ],
)  # fmt: skip
def test_static_merges_are_expressed_where_the_space_can(
    folder: Path, section: dict[str, Any], in_space: int
) -> None:
    """And what the space's recipe makes is the merge: the same weights, to their last digits."""
    decided = plan_search(make_plan(load_recipe(write_search(folder, section))), OPTIONS)
    assert [merge.name for merge in decided.statics][:4] == ["uniform soup", "base", "a", "b"]
    assert len(decided.statics) == 14
    assert sum(bool(merge.genome) for merge in decided.statics) == in_space
    plain = plan_search(
        make_plan(load_recipe(write_search(folder, {"method": "ties"}))), OPTIONS
    ).statics
    live = MergeableModel(decided.static(), OPTIONS, device="cpu", dtype="float32")
    for ours, theirs in list(zip(decided.statics, plain, strict=True))[::3]:
        live.become(ours.recipe)
        expressed = {name: p.detach().clone() for name, p in live.live.net.named_parameters()}
        live.become(theirs.recipe)
        for name, parameter in live.live.net.named_parameters():
            torch.testing.assert_close(expressed[name], parameter, rtol=0.01, atol=1e-3)
    live.close()


@pytest.mark.parametrize(
    ("method", "searched"), [("task_arithmetic", "weight"), ("ties", "lambda")]
)
def test_a_search_never_ends_below_the_best_static_merge(
    folder: Path, method: str, searched: str
) -> None:
    """One candidate, far from everything: the result is a static merge, and the report says so."""
    section = {"method": method, "evaluations": 1, "start": "middle",
               "parameters": {searched: {"min": 0, "max": 40}}}  # fmt: skip
    result = merge(write_search(folder, section), folder / "out")
    search = result.report["search"]
    lines = journal(folder / "out" / "search_journal.jsonl")[1:]
    scores = {
        line["number"]: mean(task["loss"][0] for task in line["values"].values())
        for line in lines
        if line["kind"] == "validation"
    }
    assert len(scores) == 15
    assert search["best"]["number"] == min(scores, key=lambda number: (scores[number], number))
    assert search["best"]["static"]
    assert any("THE RESULT IS A STATIC MERGE" in line for line in search["warnings"])
    again = merge(folder / "out" / "best_recipe.yaml", folder / "again")
    files = [(path / "model.safetensors").read_bytes() for path in (result.path, again.path)]
    assert files[0] == files[1]


def test_a_search_starts_where_it_is_told(folder: Path) -> None:
    (folder / "start.yaml").write_text(
        "merge_method: task_arithmetic\nbase_model: base\nparameters: {weight: 0.9}\n"
        "models: [{model: a, parameters: {weight: 0.2}}, {model: b}]\n"
    )
    first = {}
    for start in ("middle", "softmax", "start.yaml"):
        more = {"temperature": 0.5} if start == "softmax" else {}
        recipe = write_search(folder, {"evaluations": 1, "start": start, **more})
        found = run_search(recipe, folder / start)
        line = next(line for line in found.folder.lines if line["kind"] == "candidate")
        first[start] = list(line["parameters"].values())
    assert first["middle"] == [0.75, 0.75]
    assert first["start.yaml"] == [0.2, 0.9]
    assert sum(first["softmax"]) == pytest.approx(1.0, abs=1e-5)
    losses = [
        sum(task.value for task in merge_cli.evaluate(
            folder / name, [folder / "a.search.jsonl", folder / "b.search.jsonl"], device="cpu",
        ).tasks.values()) / 2
        for name in ("a", "b")
    ]  # fmt: skip
    ratio = math.exp((losses[1] - losses[0]) / 0.5)
    assert first["softmax"][0] / first["softmax"][1] == pytest.approx(ratio, rel=1e-4)


# Optimizers and generations


@pytest.mark.parametrize("optimizer", ["cma-es", "random", "tpe", "nsga2"])
def test_the_same_seed_and_scores_propose_the_same(folder: Path, optimizer: str) -> None:
    recipe = load_recipe(write_search(folder, {"optimizer": optimizer, "parameters": {
        "weight": {"min": 0, "max": 1}, "normalize": {"choices": [True, False]}}}))  # fmt: skip
    assert recipe.search is not None
    space = Space(recipe, 2)

    def proposals(seed: int) -> list[list[list[float]]]:
        assert recipe.search is not None
        one = make_optimizer(recipe.search, space, seed, [0.5] * len(space), 2)
        found = []
        for _ in range(4):
            random.random()
            torch.rand(3)
            asked = one.ask()
            assert all(0 <= u <= 1 for genome in asked for u in genome)
            parts = [(sum(genome), -genome[0]) for genome in asked]
            one.tell(asked, [sum(part) for part in parts], parts)
            found.append(asked)
        return found

    first = proposals(1)
    assert first == proposals(1)
    assert first != proposals(2)
    values = space.values(first[0][0])
    assert values == space.values([0.5] * len(space))  # the start is the first candidate


def test_cma_es_finds_the_bottom_of_a_bowl_and_restarts(folder: Path) -> None:
    recipe = load_recipe(write_search(folder, {"restarts": 1}))
    assert recipe.search is not None
    space = Space(recipe, 2)
    one = make_optimizer(recipe.search, space, 0, [0.5] * len(space), 1)
    best, populations = 9.0, set()
    for _ in range(400):
        populations.add(one.population)
        asked = one.ask()
        scores = [(g[0] - 0.97) ** 2 + (g[1] - 0.2) ** 2 for g in asked]
        best = min(best, *scores)
        one.tell(asked, scores, [(score,) for score in scores])
        if one.ended:
            break
    assert best < 1e-6
    assert populations == {4, 8}
    assert "converged" in one.ended


@pytest.mark.parametrize("optimizer", ["cma-es", "tpe", "nsga2", "random"])
def test_a_search_resumes_from_any_byte_of_its_journal(folder: Path, optimizer: str) -> None:
    recipe = write_search(folder, {"optimizer": optimizer, "start": "softmax"})
    whole = run_search(recipe, folder / "whole")
    raw = (whole.folder.path / "journal.jsonl").read_bytes()
    cuts = random.Random(optimizer).sample(range(len(raw)), 4)
    for number, cut in enumerate([*cuts, 0, len(raw)]):
        residency = folder / f"part{number}.search"
        residency.mkdir()
        (residency / MARK).touch()
        (residency / "journal.jsonl").write_bytes(raw[:cut])
        again = run_search(recipe, folder / f"part{number}")
        assert journal(residency / "journal.jsonl") == journal(whole.folder.path / "journal.jsonl")
        assert again.text == whole.text


def test_the_number_of_workers_changes_nothing(folder: Path) -> None:
    recipe = write_search(folder, {"evaluations": 8})
    one = run_search(recipe, folder / "one")
    recipe = write_search(folder, {"evaluations": 8, "workers": 2})
    two = run_search(recipe, folder / "two")
    assert one.text == two.text

    def by_place(path: Path) -> Any:
        return sorted(journal(path / "journal.jsonl")[1:], key=lambda x: (x["kind"], x["number"]))

    assert by_place(one.folder.path) == by_place(two.folder.path)
    assert two.record["cost"]["workers"] == 2


def test_more_evaluations_go_on_where_fewer_ended(folder: Path) -> None:
    short = run_search(write_search(folder, {"evaluations": 1}), folder / "out")
    longer = run_search(write_search(folder, {"evaluations": 12}), folder / "out")
    whole = run_search(write_search(folder, {"evaluations": 12}), folder / "whole")
    assert short.record["cost"]["evaluations"] == 1 + short.record["cost"]["static_evaluations"]
    assert longer.text == whole.text
    assert longer.record["history"] == whole.record["history"]


def test_another_recipe_is_not_continued(folder: Path) -> None:
    run_search(write_search(folder, {"evaluations": 2}), folder / "out")
    other = write_search(folder, {"evaluations": 2, "sigma": 0.3})
    with pytest.raises(UsageError, match="another recipe"):
        run_search(other, folder / "out")
    run_search(other, folder / "out", fresh=True)
    path = folder / "out.search" / "journal.jsonl"
    lines = path.read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if '"candidate"' in line)
    changed = unseal(lines[first].encode() + b"\n")
    assert changed is not None
    changed["genome"][0] += 0.01
    (folder / "out.search" / "search.json").unlink()
    path.write_text(
        "\n".join([*lines[:first], seal(changed).decode().strip(), *lines[first + 1 :]]) + "\n"
    )
    with pytest.raises(CorruptFileError, match="candidate 0"):
        run_search(other, folder / "out")


def test_halving_evaluates_fewer_rows_and_ends_on_all(folder: Path) -> None:
    recipe = write_search(folder, {"fidelity": [0.25], "evaluations": 8})
    found = run_search(recipe, folder / "out")
    shares = [line["share"] for line in journal(found.folder.path / "journal.jsonl")[1:]
              if line["kind"] == "candidate"]  # fmt: skip
    assert shares == ([0.25] * 4 + [1.0] * 2) * 2
    history = found.record["history"]
    assert sum(one["score"] is None for one in history) == 4
    kept = {entry["number"] for entry in history if entry["share"] == 1.0}
    assert found.record["best"]["static"] or found.record["best"]["number"] in kept


@pytest.mark.parametrize(
    ("search", "listed", "keys"),
    [
        ({"method": "slerp", "parameters": {"t": {"min": 0, "max": 1}}, "layer_groups": 2,
          "smooth": True, "filters": ["mlp"]}, ("base", "a"), {}),
        ({"method": "soup", "optimizer": "random"}, ("a", "b"), {"base_model": None}),
        ({"method": ["ties", "dare_ties"], "optimizer": "tpe", "parameters": {
            "density": {"min": 0.01, "max": 1, "log": True, "tied": "models"},
            "elect": {"choices": ["weighted", "unweighted"]}}}, ("a", "b"), {}),
        ({"method": ["task_arithmetic", "ties"], "optimizer": "nsga2",
          "parameters": {"weight": {"min": 0, "max": 1}, "density": {"min": 0.1, "max": 1}}},
         ("a", {"model": "b", "parameters": {"weight": 0.5}}), {"parameters": {"lambda": 0.5}}),
    ],
    ids=["slerp", "soup", "choices", "several"],
)  # fmt: skip
def test_searches_of_all_kinds_end_in_a_recipe_that_runs(
    folder: Path, search: dict[str, Any], listed: tuple[Any, ...], keys: dict[str, Any]
) -> None:
    recipe = write_search(folder, {**search, "evaluations": 8}, models=listed, **keys)
    result = merge(recipe, folder / "out")
    found = result.report["search"]
    assert found["cost"]["failed"] == 0
    assert found["front"]
    again = merge(folder / "out" / "best_recipe.yaml", folder / "again")
    weights = [(path / "model.safetensors").read_bytes() for path in (result.path, again.path)]
    assert weights[0] == weights[1]


# Failures, splits, constraints


def fail_when(monkeypatch: pytest.MonkeyPatch, fails: Any) -> None:
    """Candidates for whose count of evaluations `fails` is true end with an error."""
    count = 0
    score_task = evaluation_run.score_task

    def sometimes(task: Any, live: Any) -> Any:
        nonlocal count
        count += 1
        if fails(count):
            raise MemoryError("no room")
        return score_task(task, live)

    monkeypatch.setattr(evaluator_module, "score_task", sometimes)


def test_failed_candidates_are_recorded_and_survived(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 14 static merges of two tasks each come first.
    fail_when(monkeypatch, lambda count: count in (1, 29, 33, 34))
    found = run_search(write_search(folder), folder / "out")
    assert found.record["static"][0]["score"] is None
    failed = [one["number"] for one in found.record["history"] if one["error"]]
    assert failed[0] == 0
    assert found.record["cost"]["failed"] == 1 + len(failed) >= 3
    assert "MemoryError: no room" in found.record["history"][0]["error"]
    assert found.record["history"][-1]["best"] is not None


@pytest.mark.parametrize("workers", [1, 2])
def test_data_that_no_candidate_can_be_scored_on_are_told(folder: Path, workers: int) -> None:
    """Of the split that is searched: what is reported on is read before."""
    rows = (folder / "a.search.jsonl").read_text()
    (folder / "a.search.jsonl").unlink()  # a link to what other tests read
    (folder / "a.search.jsonl").write_text(rows + '{"words": "of no known form"}\n')
    recipe = write_search(folder, {"workers": workers})
    with pytest.raises(SourceError, match="line 5: has neither text nor completion"):
        run_search(recipe, folder / "out")


def test_a_constraint_that_the_result_breaks_is_said(folder: Path) -> None:
    tasks = [
        {"task": "loss", "data": "a.search.jsonl"},
        {"task": "loss", "data": "a.test.jsonl", "split": "test", "at_most": 0.5},
    ]
    found = run_search(write_search(folder, objective=tasks), folder / "out")
    assert "BREAKS A CONSTRAINT on the split test" in found.record["warnings"]
    assert found.record["best"]["violation"] == 0
    with pytest.raises(GateError, match="the result breaks a constraint"):
        gate(found.record, True, folder)


def test_many_failures_in_a_row_stop_it_with_the_reason(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_when(monkeypatch, lambda count: count > 2)
    with pytest.raises(MergeCliError, match=r"3 candidates in a row .* MemoryError: no room"):
        run_search(write_search(folder, {"failures": 3}), folder / "out")
    assert len(journal(folder / "out.search" / "journal.jsonl")) == 1 + 1 + 3


def test_a_worker_that_dies_fails_its_candidate_alone(folder: Path) -> None:
    (folder / "task.py").write_text(
        "import multiprocessing, os, pathlib\n"
        "def deadly(net, tokenizer):\n"
        "    flag = pathlib.Path(__file__).with_name('died')\n"
        "    if multiprocessing.parent_process() and not flag.exists():\n"
        "        flag.touch()\n"
        "        os._exit(9)\n"
        "    return next(net.parameters()).sum().item()\n"
    )
    recipe = write_search(
        folder,
        {"workers": 2, "evaluations": 2, "population": 2},
        objective=[{"python": "task.py:deadly"}],
    )
    found = run_search(recipe, folder / "out")
    errors = [line["error"] for line in found.folder.lines if line.get("error")]
    assert len(errors) == found.record["cost"]["failed"] == 1
    assert "the worker process ended (exit code 9)" in errors[0]


def test_splits_that_share_rows_are_refused(folder: Path) -> None:
    rows = (folder / "a.search.jsonl").read_text().splitlines()
    spaced = json.dumps(json.loads(rows[2]), indent=None, separators=(" , ", " : "))
    (folder / "other.jsonl").write_text('{"text": "new"}\n' + spaced + "\n")
    tasks = [{"task": "loss", "data": "a.search.jsonl"},
             {"task": "loss", "data": "other.jsonl", "split": "test"}]  # fmt: skip
    with pytest.raises(MismatchError) as caught:
        run_search(write_search(folder, objective=tasks), folder / "out")
    text = str(caught.value)
    assert "share 1 row" in text
    assert "other.jsonl:2" in text
    assert "a.search.jsonl:3" in text


def test_objectives_name_their_mistakes(folder: Path) -> None:
    recipe = folder / "r.yaml"
    recipe.write_text(
        "merge_method: evolutionary\nbase_model: base\nmodels: [{model: a}, {model: b}]\n"
        "search: {method: ties, parameters: {lambda: {min: 0, max: 1}}}\n"
        "objective:\n"
        "  - {task: loss, data: a.search.jsonl, wieght: 2}\n"
        "  - {task: loss, data: a.search.jsonl, name: x, split: tset}\n"
        "  - {task: loss, data: a.search.jsonl, name: y, metric: accuracy}\n"
        "  - {task: los, data: a.search.jsonl}\n"
    )
    with pytest.raises(RecipeError) as caught:
        parse_objective(load_recipe(recipe))
    found = [str(problem).removeprefix(f"{folder}/") for problem in caught.value.problems]
    assert "r.yaml:6:40: objective[0].wieght: unknown key. Did you mean 'weight'?" in found
    assert any(x.startswith("r.yaml:7:56: objective[1].split") and "'test'" in x for x in found)
    assert any(x.startswith("r.yaml:9:12: objective[3].task") and "'loss'" in x for x in found)
    recipe.write_text(recipe.read_text().replace("wieght", "weight").replace("tset", "test")
                      .replace("{task: los,", "{task: loss, name: z,"))  # fmt: skip
    with pytest.raises(RecipeError, match=r"objective\[2\].metric: loss has no metric 'accuracy'"):
        parse_objective(load_recipe(recipe))


def test_scores_weigh_point_down_and_keep_constraints(folder: Path) -> None:
    goals = (Goal("x", weight=3.0), Goal("y", "accuracy"), Goal("z", weight=0.0, at_most=2.0),
             Goal("x", weight=0.0, no_worse_than="base", margin=0.1))  # fmt: skip
    split = Split("search", EvalSpec(()), goals)
    values = {"x": {"loss": Value(2.0, "lower")}, "z": {"loss": Value(2.5, "lower")},
              "y": {"loss": Value(9.0, "lower"), "accuracy": Value(0.5, "higher")}}  # fmt: skip
    base = {"x": {"loss": Value(1.5, "lower")}}
    score = split.score(values, base)
    assert score.parts == (1.5, -0.125)
    assert score.total == 1.375
    assert score.violation == pytest.approx(0.5 + 0.4)
    assert not split.is_maximised(values)
    accuracy = Split("search", EvalSpec(()), (goals[1], goals[2]))
    assert accuracy.is_maximised(values)
    assert not Split("search", EvalSpec(()), (Goal("y", "accuracy", goal="min"),)).is_maximised(
        values
    )


def test_a_constraint_rules_out_what_breaks_it(folder: Path) -> None:
    tasks = [
        {"task": "loss", "data": "a.search.jsonl"},
        {"task": "loss", "data": "b.search.jsonl", "weight": 0, "no_worse_than": "base"},
    ]
    found = run_search(write_search(folder, objective=tasks), folder / "out")
    least = min(entry["violation"] for entry in found.record["history"])
    assert found.record["best"]["violation"] <= least
    verdict = {**found.record["verdict"], "better": False}
    with pytest.raises(GateError, match="improvement is required"):
        gate({**found.record, "verdict": verdict}, True, folder)
    gate({**found.record, "verdict": verdict}, False, folder)


# Greedy soup


def test_greedy_soup_is_the_naive_loop(folder: Path) -> None:
    tasks = [{"task": "loss", "data": f"{name}.search.jsonl"} for name in ("a", "b")]
    models = ("a", "b", "c", "base")
    recipe = write_search(folder, method="greedy_soup", objective=tasks, models=models)
    result = merge(recipe, folder / "out")

    def loss(members: list[str]) -> float:
        path = folder / "naive.yaml"
        listed = [{"model": name} for name in models if name in members]
        path.write_text(yaml.safe_dump({
            "merge_method": "soup", "base_model": "base", "models": listed, "dtype": "bfloat16",
        }))  # fmt: skip
        out = folder / ("naive " + "".join(sorted(members)))
        if not out.exists():
            merge(path, out)
        found = merge_cli.evaluate(
            out, [folder / "a.search.jsonl", folder / "b.search.jsonl"], device="cpu", seed=3
        )
        return sum(task.value for task in found.tasks.values()) / 2

    order = sorted(models, key=lambda name: loss([name]))
    members, best = [order[0]], loss([order[0]])
    for name in order[1:]:
        tried = loss([*members, name])
        if tried < best:
            members, best = [*members, name], tried
    assert result.report["search"]["best"]["score"] == best
    chosen = yaml.safe_load((folder / "out" / "best_recipe.yaml").read_text())
    assert chosen["merge_method"] == "soup"
    assert [Path(m["model"]).name for m in chosen["models"]] == [
        name for name in models if name in members
    ]
    naive = folder / ("naive " + "".join(sorted(members))) / "model.safetensors"
    assert (folder / "out" / "model.safetensors").read_bytes() == naive.read_bytes()


# Stopping


def test_ctrl_c_leaves_the_best_so_far_and_the_same_call_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_search(folder)
    whole = run_search(recipe, folder / "whole")
    generation = Loop._generation

    def interrupted(self: Loop, number: int, genomes: list[list[float]]) -> Any:
        if number == 2:
            raise KeyboardInterrupt
        return generation(self, number, genomes)

    monkeypatch.setattr(Loop, "_generation", interrupted)
    with pytest.raises(Interrupted, match="the best so far"):
        run_search(recipe, folder / "out")
    best = load_recipe(folder / "out.search" / "best_recipe.yaml")
    assert best.merge_method == "task_arithmetic"
    monkeypatch.setattr(Loop, "_generation", generation)
    again = run_search(recipe, folder / "out")
    assert again.text == whole.text
    assert again.record["cost"]["resumed"] == 8 + again.record["cost"]["static_evaluations"]
    monkeypatch.setattr(Loop, "_generation", None)  # it has ended: nothing is left to do
    assert run_search(recipe, folder / "out").record == again.record


def test_ctrl_c_inside_a_generation_leaves_the_best_of_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_search(folder)
    append = SearchWorkspace.append
    seen: list[dict[str, Any]] = []

    def third(self: SearchWorkspace, line: dict[str, Any]) -> None:
        append(self, line)
        seen.extend([line] if line["kind"] in ("static", "candidate") else [])
        if len(seen) == 14 + 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(SearchWorkspace, "append", third)
    with pytest.raises(Interrupted, match=r"stopped after 17 evaluations; the best so far"):
        run_search(recipe, folder / "out")
    best = (folder / "out.search" / "best_recipe.yaml").read_text()
    means = [mean(task["loss"][0] for task in line["values"].values()) for line in seen]
    assert f"score {min(means):.6g}" in best
    load_recipe(folder / "out.search" / "best_recipe.yaml")


def kill_and_resume(folder: Path, kills: int) -> None:
    recipe = write_search(folder, {"evaluations": 16})
    whole = run_search(recipe, folder / "whole")
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from tests.support.evolve_tiny import run_search\n"
        "run_search(Path(sys.argv[2]), Path(sys.argv[3]))\n"
    )
    path = folder / "out.search" / "journal.jsonl"
    draw = random.Random(kills)
    for _ in range(kills):
        before = path.stat().st_size if path.exists() else 0
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(ROOT), str(recipe), str(folder / "out")]
        )
        # Once it has begun to evaluate: some moment within the next evaluations.
        while process.poll() is None and not (path.exists() and path.stat().st_size > before):
            time.sleep(0.005)
        time.sleep(draw.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
    again = run_search(recipe, folder / "out")
    assert again.text == whole.text
    assert journal(path) == journal(whole.folder.path / "journal.jsonl")


def test_killed_and_resumed(folder: Path) -> None:
    kill_and_resume(folder, 2)


@pytest.mark.slow
def test_killed_at_ten_moments_and_resumed(folder: Path) -> None:
    kill_and_resume(folder, 10)


# The command line


def test_the_plan_says_what_the_genome_means(folder: Path, capsys: Any) -> None:
    from merge_cli.console import Screen

    recipe = write_search(folder, {"layer_groups": 2})
    plan = make_plan(load_recipe(recipe))
    Screen().plan(plan, MergeOptions(device="cpu"), every=False, as_json=False)
    text = capsys.readouterr().out
    for words in ("a search of task_arithmetic by cma-es: 4 numbers, 12 evaluations",
                  "weight of a, layer 0", "weight of b, layer 1", "0 to 1.5",
                  "validation: a (loss), b (loss)"):  # fmt: skip
        assert words in text
    Screen().plan(plan, MergeOptions(device="cpu"), every=False, as_json=True)
    found = json.loads(capsys.readouterr().out)["search"]
    assert [one["sets"] for one in found["genome"]][1] == "weight of a, layer 1"
    assert not os.path.exists(folder / "out.search")


def test_candidates_are_scored_on_some_rows_and_the_last_few_on_all(folder: Path) -> None:
    recipe = write_search(folder, {"rows": 2, "evaluations": 4, "finalists": 2}, splits=("search",))
    decided = plan_search(make_plan(load_recipe(recipe)), OPTIONS)
    limits = {n: [t.limit for t in s.spec.tasks] for n, s in decided.objective.splits.items()}
    assert limits == {"search": [2, 2], "all rows": [None, None]}
    result = merge(recipe, folder / "out")
    lines = journal(folder / "out" / "search_journal.jsonl")[1:]
    kinds = [line["kind"] for line in lines]
    assert kinds.count("validation") == 14 + 2
    tokens = {kind: max(line["tokens"] for line in lines if line["kind"] == kind)
              for kind in ("static", "candidate", "validation")}  # fmt: skip
    assert tokens["static"] == tokens["candidate"] < tokens["validation"]
    assert result.report["search"]["split"] == "all rows"
    limited = [{"task": "loss", "data": "a.search.jsonl", "limit": 3}]
    for changes, objective in (({"rows": 0}, None), ({"rows": 2}, limited)):
        recipe = write_search(folder, changes, splits=("search",), objective=objective)
        splits = plan_search(make_plan(load_recipe(recipe)), OPTIONS).objective.splits
        assert list(splits) == ["search"]


def test_the_verdict_has_a_paired_interval(folder: Path) -> None:
    result = merge(write_search(folder, {"evaluations": 6}), folder / "out")
    verdict = result.report["search"]["verdict"]
    low, high = verdict["interval"]
    assert low <= verdict["difference"] <= high
    assert verdict["confirmed"] == (high < 0)
    metric = Metric("loss", "nats", "lower", [1.0, 2.0, 3.0, 5.0], [1.0] * 4)
    better = replace(metric, parts=[0.5, 1.5, 2.5, 4.5])
    split = Split("test", EvalSpec(()), (Goal("x"), Goal("y", weight=3.0)))
    bounds = paired_interval(split, [better, better], [metric, metric])
    assert bounds is not None
    assert bounds.low == pytest.approx(-0.5)  # the same rows are drawn for both
    assert bounds.high == pytest.approx(-0.5)
    single = replace(metric, parts=[1.0], weights=[1.0])
    assert paired_interval(split, [single, better], [single, metric]) is None


@pytest.mark.parametrize("method", sorted(DEFAULT_RANGES))
def test_methods_have_default_ranges_that_start_at_the_soup(folder: Path, method: str) -> None:
    recipe = write_search(folder, {"method": method, "parameters": None})
    if method in ("slerp", "nearswap"):
        recipe = write_search(folder, {"method": method, "parameters": None}, models=("base", "a"))
    space = plan_search(make_plan(load_recipe(recipe)), OPTIONS).space
    assert space is not None
    start = dict(zip([gene.searched.name for gene in space.genes],
                     space.values(soup_start(space)), strict=True))  # fmt: skip
    assert start.get("weight", 0.5) == 0.5
    assert start.get("lambda", 1.0) == pytest.approx(1.0, rel=1e-5)
