"""Comparisons: the arithmetic against naive formulas, the whole thing on the real family."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import merge_cli
from merge_cli.comparison import cost
from merge_cli.comparison.cost import CostLog, MergeCost
from merge_cli.comparison.entries import EntryNames
from merge_cli.comparison.files import comparison_record
from merge_cli.comparison.merges import merge_key
from merge_cli.comparison.page import render_comparison
from merge_cli.comparison.result import Comparison, ModelEntry, Role
from merge_cli.comparison.tables import csv_text, markdown
from merge_cli.comparison.verdict import _amount, verdict
from merge_cli.evaluation.result import Cost, Evaluation, Metric, TaskResult
from merge_cli.planning.planner import load_recipe, make_plan
from merge_cli.sources.source import Source
from tests.support.command import cli, failed
from tests.support.paths import ROOT


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGE_CLI_CACHE", str(tmp_path / "cache"))


def entrant(
    name: str,
    role: Role,
    losses: dict[str, float],
    seconds: float | None = None,
    better: Any = "lower",
) -> ModelEntry:
    generator = np.random.default_rng(5)
    tasks = {}
    for task, loss in losses.items():
        hard = generator.normal(0, 0.2, 40)  # the same rows for everybody
        weights = generator.integers(10, 50, 40)
        parts = (loss + hard - (hard * weights).sum() / weights.sum()) * weights
        metric = Metric("loss", "nats per token", better, parts.tolist(), weights.tolist())
        tasks[task] = TaskResult(task, "loss", {"loss": metric}, [{}] * 40, Cost(1.0, 100, 2))
    cost = None if seconds is None else MergeCost(seconds, 0, 0, 0, 2 * 10**8, None, None)
    found = Evaluation(name, "0" * 64, "cpu", "float32", tasks)
    return ModelEntry(name, role, name, found, "soup", "merge_method: soup\n", cost)


def example(**more: Any) -> Comparison:
    return Comparison(
        (
            entrant("base", "base", {"math": 2.0, "code": 4.0}),
            entrant("math", "source", {"math": 1.0, "code": 5.0}),
            entrant("code", "source", {"math": 3.0, "code": 3.5}),
            entrant("uniform soup", "baseline", {"math": 1.8, "code": 3.9}, 2.0),
            entrant("better", "recipe", {"math": 1.5, "code": 3.75}, 8.0),
            entrant("slower", "recipe", {"math": 1.6, "code": 3.8}, 9.0),
            entrant("quick", "recipe", {"math": 1.9, "code": 4.0}, 1.0),
        ),
        {"math": "math", "code": "code"},
        "uniform soup",
        **more,
    )


def test_normalised_is_0_at_the_base_and_1_at_the_expert() -> None:
    found = example()
    assert found.normalised["base", "math"].value == 0
    assert found.normalised["math", "math"].value == pytest.approx(1)
    assert found.normalised["better", "math"].value == pytest.approx(0.5)
    assert found.normalised["code", "math"].value == pytest.approx(-1.0)
    assert found.normalised["better", "code"].value == pytest.approx(0.5)
    assert found.quality["better"].value == pytest.approx(0.5)
    assert found.averages["better"].value == pytest.approx((1.5 + 3.75) / 2)
    gain = found.gain("better")
    assert gain is not None
    assert gain.value == pytest.approx(0.5 - (0.2 + 0.2) / 2)
    # All rows differ by the same amount: the paired interval has no width, the values' have.
    assert gain.interval is not None
    assert gain.interval.high - gain.interval.low < 0.2
    whole = found.scores["better", "math"].interval
    assert whole is not None
    assert whole.high - whole.low > 0.05


def test_accuracy_counts_the_other_way() -> None:
    found = Comparison(
        (
            entrant("base", "base", {"math": 0.2}, better="higher"),
            entrant("math", "source", {"math": 0.6}, better="higher"),
            entrant("uniform soup", "baseline", {"math": 0.3}, 1.0, better="higher"),
            entrant("worse", "recipe", {"math": 0.1}, 1.0, better="higher"),
        ),
        {"math": "math"},
        "uniform soup",
    )
    assert found.normalised["uniform soup", "math"].value == pytest.approx(0.25)
    assert found.normalised["worse", "math"].value == pytest.approx(-0.25)
    assert found.ranking_better == "higher"


def test_a_domain_whose_expert_is_no_better_than_the_base_is_not_normalised() -> None:
    found = Comparison(
        (
            entrant("base", "base", {"math": 2.0, "code": 4.0}),
            entrant("math", "source", {"math": 2.5, "code": 4.0}),
            entrant("code", "source", {"math": 2.5, "code": 3.0}),
            entrant("uniform soup", "baseline", {"math": 1.8, "code": 3.9}, 2.0),
        ),
        {"math": "math", "code": "code"},
    )
    assert found.shared == ("code",)
    assert found.quality["uniform soup"].value == pytest.approx(0.1)


def test_the_front_is_what_nothing_beats() -> None:
    assert example().front == ("quick", "uniform soup", "better")


def test_the_verdict_says_what_to_use() -> None:
    """The best merge, where it beats the parents and the soup by more than chance."""
    found = verdict(example())
    assert found is not None
    assert (found.use, found.sure) == ("better", True)
    assert found.text.startswith("Use better: in the normalised mean (0: the base, 1: each task's ")
    assert "it is 0.5 better than base" in found.text
    assert "It is 0.3 better than the uniform soup" in found.text
    assert "Against the base it is better on math (0.5 nats per token) and code (0.25" in found.text
    assert found.text.endswith("Making it takes 8.0 s.")
    record = comparison_record(example())
    assert record["verdict"]["text"] == found.text
    assert found.text in markdown(record)
    assert "Use better:" in render_comparison(record)


def test_shares_are_told_in_points() -> None:
    assert _amount(0.256, "of questions") == "25.6 points"
    assert _amount(0.256, "nats per token") == "0.256 nats per token"


def noisy(name: str, role: Role, loss: float, seed: int, seconds: float | None) -> ModelEntry:
    """A model whose rows differ from those of the others by chance."""
    entry = entrant(name, role, {"math": loss}, seconds)
    metric = entry.evaluation["math"].metrics["loss"]
    noise = np.random.default_rng(seed).normal(0, 1.0, 40)
    noise -= (noise * np.array(metric.weights)).sum() / sum(metric.weights)
    parts = (np.array(metric.parts) + noise * np.array(metric.weights)).tolist()
    tasks = {"math": TaskResult("math", "loss", {"loss": replace(metric, parts=parts)}, [{}] * 40,
                                Cost(1.0, 100, 2))}  # fmt: skip
    return replace(entry, evaluation=replace(entry.evaluation, tasks=tasks))


def test_the_verdict_does_not_believe_chance() -> None:
    base = entrant("base", "base", {"math": 2.0})
    soup = entrant("uniform soup", "baseline", {"math": 1.8}, 2.0)
    lucky = noisy("lucky", "recipe", 1.75, 1, 8.0)
    found = verdict(Comparison((base, soup, lucky), {}, "uniform soup"))
    assert found is not None
    assert (found.use, found.sure) == ("uniform soup", True)
    assert "lucky is 0.05 ahead of it" in found.text
    assert "may be chance" in found.text
    found = verdict(Comparison((base, lucky), {}, None))
    assert found is not None
    assert (found.use, found.sure) == ("base", False)
    assert "no merge is better by more than chance" in found.text
    worse = entrant("worse", "recipe", {"math": 2.5}, 1.0)
    found = verdict(Comparison((base, worse), {}, None))
    assert found is not None
    assert "worse, is 0.5 behind it" in found.text
    assert verdict(Comparison((base,), {}, None)) is None


def test_without_a_base_the_mean_ranks() -> None:
    found = Comparison(
        (
            entrant("math", "source", {"math": 1.0, "code": 5.0}),
            entrant("uniform soup", "baseline", {"math": 1.8, "code": 3.9}, 2.0),
            entrant("mine", "recipe", {"math": 1.5, "code": 3.8}, 2.5),
        ),
        {"math": "math"},
        "uniform soup",
    )
    assert found.quality == {}
    gain = found.gain("mine")
    assert gain is not None
    assert gain.value == pytest.approx((1.8 + 3.9 - 1.5 - 3.8) / 2)
    assert found.front == ("uniform soup", "mine")
    text = markdown(comparison_record(found))
    assert "normalised" not in text


def test_the_tables_say_the_same() -> None:
    record = comparison_record(example(remarks=("a note",)))
    text = markdown(record)
    assert "| **better** | 1.500 | 3.750 | 2.625 | 0.500" in text
    assert "- a note" in text
    rows = list(csv.DictReader(csv_text(record).splitlines()))
    assert len(rows) == 7 * 3
    (own,) = [row for row in rows if (row["model"], row["task"]) == ("better", "math")]
    assert float(own["value"]) == pytest.approx(1.5)
    assert float(own["low"]) < 1.5 < float(own["high"])
    assert float(own["normalised"]) == pytest.approx(0.5)
    assert own["seconds"] == "8.0"
    page = render_comparison(json.loads(json.dumps(record)))
    for expected in ("better and slower", "nats per token (less is better)", "Pareto front",
                     "wall time of the merge (logarithmic)", "a note"):  # fmt: skip
        assert expected in page or expected.replace(" and ", ", ") in page, expected
    assert page.count("<script") == 1  # the page's own


def test_a_page_without_merges_is_a_page() -> None:
    alone = Comparison(example().entries[:3], {"math": "math", "code": "code"}, None)
    record = comparison_record(alone)
    assert record["verdict"] is None
    assert "3 models on math and code." in render_comparison(record)


def test_names_cannot_break_the_page() -> None:
    bad = "<b>&\"'</b>"
    found = Comparison(
        (
            entrant("base", "base", {"<i>": 2.0}),
            entrant("<i>x", "source", {"<i>": 1.0}),
            entrant("uniform soup", "baseline", {"<i>": 1.8}, 2.0),
            entrant(bad, "recipe", {"<i>": 1.7}, 2.0),
        ),
        {"<i>": "<i>x"},
        "uniform soup",
        {},
        (bad,),
    )
    page = render_comparison(comparison_record(found))
    assert "<b>" not in page
    assert "<i>" not in page


def test_a_domain_that_hardly_differs_is_not_normalised() -> None:
    """Forty answers, of which the expert has two more right than the base: chance."""

    def answers(name: str, role: Role, right: int, seconds: float | None = None) -> ModelEntry:
        made = entrant(name, role, {"math": 0.0}, seconds)
        hits = [1.0] * right + [0.0] * (40 - right)
        metric = Metric("accuracy", "of questions", "higher", hits, [1.0] * 40)
        task = TaskResult("math", "multiple_choice", {"accuracy": metric}, [{}] * 40)
        return replace(made, evaluation=replace(made.evaluation, tasks={"math": task}))

    found = Comparison(
        (answers("base", "base", 2), answers("math", "source", 4),
         answers("uniform soup", "baseline", 3, 1.0), answers("mine", "recipe", 3, 1.0)),
        {"math": "math"}, "uniform soup",
    )  # fmt: skip
    assert found.shared == ()
    assert any("math is not normalised" in note for note in found.notes)
    record = json.loads(json.dumps(comparison_record(found), allow_nan=False))
    (mine,) = [row for row in markdown(record).splitlines() if "| mine" in row or "**mine" in row]
    assert "*" not in mine.replace("**mine**", "")


def test_a_single_example_shows_no_difference() -> None:
    def one(name: str, role: Role, nats: float, seconds: float | None = None) -> ModelEntry:
        made = entrant(name, role, {"book": 0.0}, seconds)
        metric = Metric("loss", "nats per token", "lower", [nats], [10.0])
        task = TaskResult("book", "loss", {"loss": metric}, [{}])
        return replace(made, evaluation=replace(made.evaluation, tasks={"book": task}))

    found = Comparison(
        (one("base", "base", 30.0), one("uniform soup", "baseline", 25.0, 1.0),
         one("mine", "recipe", 24.0, 1.0)),
        {}, "uniform soup",
    )  # fmt: skip
    gain = found.gain("mine")
    assert gain is not None
    assert gain.interval is None
    record = comparison_record(found)
    assert "+0.100 *" not in markdown(record)
    assert "+0.100" in markdown(record)
    assert "of a single example" in render_comparison(record)


def test_names_are_given_once(tmp_path: Path) -> None:
    def source(label: str) -> Source:
        root = tmp_path / label
        root.mkdir(parents=True)
        return Source(label, root, {}, {}, {})

    base, one, other = source("llama/base"), source("x/math"), source("y/math")
    names = EntryNames(base, [one, other, source("z/base")])
    assert list(names.of.values()) == ["base", "math", "y/math", "z/base"]
    assert names.of_recipe(Path("a/math.yaml"), None) == "a/math"
    assert names.of_recipe(Path("b/base.yaml"), None) == "b/base"
    assert names.of_recipe(Path("a/soup.yaml"), "uniform soup") == "soup"
    assert names.of_recipe(Path("a/soup.yml"), None) == "a/soup"
    llama = EntryNames(source("only/llama"), [])
    assert llama.of_recipe(Path("base.yaml"), None) == "base.yaml", "base means the base"


RECIPE = """\
merge_method: task_arithmetic
base_model: {zoo}/base
models:
  - {zoo}/math
  - {zoo}/code
parameters: {{lambda: {scale}}}
"""
EVAL = """\
tasks:
  - {{task: loss, data: {zoo}/data/math.val.jsonl, limit: 12}}
  - {{task: loss, data: {zoo}/data/code.val.jsonl, limit: 4}}
"""


@pytest.fixture
def job(zoo: Path, tmp_path: Path) -> Path:
    for name, scale in (("half", 0.5), ("third", 0.3)):
        (tmp_path / f"{name}.yaml").write_text(RECIPE.format(zoo=zoo, scale=scale))
    (tmp_path / "eval.yaml").write_text(EVAL.format(zoo=zoo))
    return tmp_path


def test_the_whole_comparison(job: Path) -> None:
    out = job / "results"
    arguments = ["compare", job / "half.yaml", job / "third.yaml", "--eval", job / "eval.yaml",
                 "--out", out]  # fmt: skip
    first = cli(*arguments, "--gate", "math.loss<=0.01")
    assert first.returncode == 5, first.stderr
    assert "half: math.loss<=0.01" in first.stderr
    assert "third: math.loss<=0.01" in first.stderr
    assert "uniform soup: math.loss<=0.01" not in first.stderr, "gates are for recipes"
    record = json.loads((out / "comparison.json").read_text())
    names = [model["name"] for model in record["models"]]
    baselines = ["uniform soup", "task arithmetic 0.4"]
    assert names == ["base", "math", "code", *baselines, "half", "third"]
    by_name = {model["name"]: model for model in record["models"]}
    assert by_name["third"]["cost"]["seconds"] > 0
    assert by_name["third"]["cost"]["peak_rss"] > 10**7
    # The table's numbers are those that evaluating the merged model gives.
    merged = next((out / "models").glob("third-*"))
    again = merge_cli.evaluate(merged, job / "eval.yaml", cache=False)
    assert again["math"].value == pytest.approx(by_name["third"]["scores"]["math"]["value"])
    examples = [json.loads(line) for line in (out / "examples.jsonl").read_text().splitlines()]
    assert {row["model"] for row in examples} == set(names)
    # The second time nothing is made or evaluated again.
    stamps = {p: p.stat().st_mtime_ns for p in (out / "models").rglob("*.safetensors")}
    second = cli(*arguments, "--json", "--require-no-worse-than", "base:math+90%")
    repeated = json.loads(second.stdout)
    for model in (*record["models"], *repeated["models"]):
        model.pop("cost")
    assert repeated["models"] == record["models"]
    assert stamps == {p: p.stat().st_mtime_ns for p in (out / "models").rglob("*.safetensors")}
    assert "merging" not in second.stderr


def test_nothing_to_compare_on_and_mistakes_are_told_before_merging(job: Path) -> None:
    out = job / "results"
    failed(cli("compare", job / "half.yaml", "-o", out), 2, "nothing to compare on")
    (job / "bad.yaml").write_text((job / "half.yaml").read_text().replace("lambda", "lamda"))
    evaluation = ["--eval", job / "eval.yaml", "-o", out]
    done = cli("compare", job / "half.yaml", job / "bad.yaml", *evaluation)
    failed(done, 2, "Did you mean 'lambda'?")
    done = cli("compare", job / "half.yaml", *evaluation, "--require-no-worse-than", "maths:math")
    failed(done, 2, "'maths' is not in the comparison")
    assert not list(out.glob("models/*"))


def test_a_recipe_that_is_a_baseline_answers_for_itself(job: Path, zoo: Path) -> None:
    text = f"merge_method: soup\nbase_model: {zoo}/base\nmodels: [{zoo}/math, {zoo}/code]\n"
    (job / "mine.yaml").write_text(text)
    done = cli("compare", job / "mine.yaml", "--eval", job / "eval.yaml", "-o", job / "results",
               "--gate", "math<=0.0001")  # fmt: skip
    failed(done, 5, "mine: math<=0.0001")
    record = json.loads((job / "results" / "comparison.json").read_text())
    assert record["reference"] == "mine"
    assert record["same"] == {"uniform soup": "mine"}


def test_another_way_to_a_folder_is_the_same_merge(job: Path, zoo: Path) -> None:
    """`../zoo` from the recipe's folder, and the folder itself."""
    (job / "recipes").mkdir()
    (job / "zoo").symlink_to(zoo)
    for name, start in (("far", "../zoo"), ("near", f"{job}/zoo")):
        text = f"merge_method: soup\nmodels: [{start}/math, {start}/code]\n"
        (job / "recipes" / f"{name}.yaml").write_text(text)
    plans = [make_plan(load_recipe(job / "recipes" / f"{n}.yaml")) for n in ("far", "near")]
    assert len({merge_key(plan, "cpu") for plan in plans}) == 1


def test_another_tokenizer_is_another_merge(job: Path, zoo: Path) -> None:
    recipe = (job / "half.yaml").read_text()
    (job / "third.yaml").write_text(f"{recipe}tokenizer_source: {zoo}/math\n")
    plans = [make_plan(load_recipe(job / f"{name}.yaml")) for name in ("half", "third")]
    first, second = (merge_key(plan, "cpu") for plan in plans)
    assert first != second


def test_an_unusable_folder_is_told(job: Path) -> None:
    (job / "file").write_text("")
    done = cli("compare", job / "half.yaml", "--eval", job / "eval.yaml", "-o", job / "file")
    failed(done, 4, "cannot be written")
    done = cli("evaluate", ROOT / "zoo" / "base", "--eval", job / "eval.yaml", "--examples", job)
    failed(done, 2, "names a file")
    failed(cli("compare", "-", "--eval", job / "eval.yaml", "-o", job / "o"), 2, "from files")


def test_without_a_base_nothing_compares_with_it(job: Path, zoo: Path) -> None:
    text = f"merge_method: slerp\nmodels: [{zoo}/math, {zoo}/code]\nparameters: {{t: 0.5}}\n"
    (job / "slerp.yaml").write_text(text)
    done = cli("compare", job / "slerp.yaml", "--eval", job / "eval.yaml", "-o", job / "results",
               "--require-no-worse-than", "base:math")  # fmt: skip
    failed(done, 2, "'base' is not in the comparison")


def test_eval_in_the_recipe(job: Path) -> None:
    section = (job / "eval.yaml").read_text().replace("tasks:", "eval:")
    (job / "half.yaml").write_text((job / "half.yaml").read_text() + section)
    done = cli("run", job / "half.yaml", job / "out", "--require-no-worse-than", "base:code+50%",
               "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [model["model"] for model in report["evaluation"]][1:] == [str(ROOT / "zoo" / "base")]
    assert report["evaluation"][0]["tasks"]["math"]["examples"] == 12
    written = json.loads((job / "out" / "merge_evaluation.json").read_text())
    assert written == {"models": report["evaluation"], "unmet": []}
    weights = (job / "out" / "model.safetensors").stat().st_mtime_ns
    again = cli("run", job / "half.yaml", job / "out")
    assert again.returncode == 0, "the merge is there: only what was measured is looked up"
    assert (job / "out" / "model.safetensors").stat().st_mtime_ns == weights
    (job / "half.yaml").write_text((job / "half.yaml").read_text().replace("loss", "los"))
    failed(cli("run", job / "half.yaml", job / "other"), 2, "Did you mean 'loss'?")


def test_a_failed_gate_leaves_the_model_and_exits_with_5(job: Path, zoo: Path) -> None:
    done = cli("run", job / "half.yaml", job / "out", "--data", zoo / "data" / "math.val.jsonl",
               "--gate", "math<=0.1")  # fmt: skip
    failed(done, 5, "math<=0.1 — math has loss")
    assert (job / "out" / "model.safetensors").exists()
    done = cli("run", job / "half.yaml", job / "other", "--gate", "math<=0.1")
    failed(done, 2, "a gate needs data to evaluate on")
    assert not (job / "other").exists()


def test_evaluate_on_the_command_line(zoo: Path, job: Path) -> None:
    done = cli("evaluate", zoo / "math", "--eval", job / "eval.yaml", "--against", zoo / "base",
               "--require-no-worse-than", "base:math", "--examples", job / "e.jsonl",
               "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    ours, base = json.loads(done.stdout)
    metric, other = (m["tasks"]["math"]["metrics"]["loss"] for m in (ours, base))
    assert metric["value"] < other["value"]
    assert other["difference"] == pytest.approx(metric["value"] - other["value"])
    low, high = other["difference_interval"]
    assert low < other["difference"] < high < 0
    assert len((job / "e.jsonl").read_text().splitlines()) == 2 * (12 + 4)
    table = cli("evaluate", zoo / "math", "--eval", job / "eval.yaml", "--against", zoo / "base")
    assert "better" in table.stdout
    assert "results from the cache" in table.stdout
    failed(cli("evaluate", zoo / "math"), 2, "nothing to evaluate")
    failed(cli("evaluate", zoo / "math", "--data", job / "no.jsonl"), 3, "no such data file")
    done = cli("evaluate", zoo / "math", "--eval", job / "eval.yaml", "--gate", "base:code")
    failed(done, 2, "is not a gate")


def test_interrupted_it_goes_on(job: Path, zoo: Path) -> None:
    (job / "eval.yaml").write_text(EVAL.format(zoo=zoo).replace("limit: 12", "limit: 60"))
    out = job / "results"
    command = [sys.executable, "-m", "merge_cli", "compare", str(job / "third.yaml"), "--eval",
               str(job / "eval.yaml"), "-o", str(out)]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    cached = Path(os.environ["MERGE_CLI_CACHE"]) / "evaluations"
    deadline = time.monotonic() + 100
    while len(list(cached.glob("*/*.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "resumes" in said
    assert "Traceback" not in said
    kept = {path: path.stat().st_mtime_ns for path in cached.glob("*/*.json")}
    assert len(kept) >= 2
    done = cli(*command[3:])
    assert done.returncode == 0, done.stderr
    assert "base: math" not in done.stderr, "it was evaluated before"
    for path, stamp in kept.items():
        assert path.stat().st_mtime_ns == stamp


def test_a_resumed_merge_costs_all_of_its_attempts(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    report = {"cost": {"seconds": 1.0, "peak_rss": 5, "peak_vram": None}}
    (tmp_path / "m" / "merge_report.json").write_text(json.dumps(report))
    ledger = CostLog(tmp_path / "costs.jsonl")
    ledger.note("m", 3.0, None, done=False)
    ledger.note("other", 100.0, None, done=True)
    ledger.note("m", 4.0, None, done=True)
    with (tmp_path / "costs.jsonl").open("a") as file:
        file.write('{"merge": "m", "sec')  # killed while writing
    again = CostLog(tmp_path / "costs.jsonl")
    assert again.cost("m", tmp_path / "m").seconds == 7.0
    again.note("m", 2.0, None, done=True)
    again = CostLog(tmp_path / "costs.jsonl")
    assert again.cost("m", tmp_path / "m").seconds == 9.0
    again.forget("m")
    assert CostLog(tmp_path / "costs.jsonl").cost("m", tmp_path / "m").seconds == 1.0


def test_energy_is_counted_where_a_meter_may_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "_RAPL", tmp_path)
    assert cost.EnergyMeter().joules() is None
    for name, used in (("intel-rapl:0", 5_000_000), ("intel-rapl:0:1", 1), ("intel-rapl:1", 9)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(str(used))
        (tmp_path / name / "max_energy_range_uj").write_text("10000000")
    meter = cost.EnergyMeter()
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("7000000")
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("4")  # began again at 10 J
    assert meter.joules() == pytest.approx(2 + 10 - 5e-6)
