"""`merge-cli demo`: its family is small and honest, and its merge wins by more than chance."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import merge_cli.console.demo as screen
from merge_cli.cli import app
from merge_cli.cli.demo import demo as demo_command
from merge_cli.comparison.result import Comparison, ModelEntry, Role
from merge_cli.demo.folder import EXPERTS, write_family
from merge_cli.demo.run import Demo, run_demo, verdict
from merge_cli.errors import UsageError
from merge_cli.evaluation.result import Evaluation, Metric, TaskResult
from tests.support.paths import ROOT

FAMILY = ROOT / "merge_cli" / "demo" / "family"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    return run_demo(tmp_path_factory.mktemp("demo") / "out")


@pytest.fixture
def problems(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "demo_family"))
    yield importlib.import_module("problems")
    del sys.modules["problems"]


def test_the_merge_is_better_than_base_and_experts_by_more_than_chance(demo: Demo) -> None:
    assert [rival.name for rival in demo.rivals if rival.beaten] == [r.name for r in demo.rivals]
    assert len(demo.rivals) == 3
    sentence = verdict(demo)
    assert sentence.startswith(f"Use {demo.merged}: over the base it gains ")
    assert "more than chance" in sentence
    assert "not more" not in sentence
    for name in EXPERTS:
        assert f"points on {name}" in sentence


def test_its_folder_holds_models_recipe_and_report(demo: Demo) -> None:
    assert (demo.merged / "model.safetensors").is_file()
    assert (demo.merged / "merge_report.html").is_file()
    page = demo.page.read_text(encoding="utf-8")
    for name in ("base", *EXPERTS, "merged", "task_arithmetic"):
        assert name in page
    record = json.loads((demo.out / "comparison.json").read_text(encoding="utf-8"))
    assert [model["role"] for model in record["models"]] == ["base", "source", "source", "recipe"]
    for (question, answers), name in zip(demo.questions, EXPERTS, strict=True):
        text = (FAMILY / "data" / f"{name}.test.jsonl").read_text(encoding="utf-8")
        assert question in [json.loads(line)["prompt"] for line in text.splitlines()]
        assert answers.keys() == {"base", *EXPERTS, "merged"}
        assert len(set(answers.values())) > 1


def test_the_family_fits_into_a_wheel() -> None:
    assert sum(path.stat().st_size for path in FAMILY.rglob("*")) < 1_600_000


def test_the_rows_are_right_and_no_number_is_in_two_splits(problems: Any) -> None:
    for name in EXPERTS:
        numbers: dict[str, list[int]] = {}
        for split in ("train", "val", "test"):
            text = (FAMILY / "data" / f"{name}.{split}.jsonl").read_text(encoding="utf-8")
            rows = [json.loads(line) for line in text.splitlines()]
            numbers[split] = [int(row["completion"]) for row in rows]
            words = [problems.WORDS[name](number) for number in numbers[split]]
            assert [row["prompt"] for row in rows] == [f"{word} =" for word in words]
        assert sorted(sum(numbers.values(), [])) == list(range(1, 1000))


@pytest.mark.parametrize(
    ("number", "english", "german", "french"),
    [
        (1, "one", "eins", "un"),
        (16, "sixteen", "sechzehn", "seize"),
        (21, "twenty-one", "einundzwanzig", "vingt et un"),
        (71, "seventy-one", "einundsiebzig", "soixante et onze"),
        (80, "eighty", "achtzig", "quatre-vingts"),
        (91, "ninety-one", "einundneunzig", "quatre-vingt-onze"),
        (101, "one hundred one", "einhunderteins", "cent un"),
        (200, "two hundred", "zweihundert", "deux cents"),
        (999, "nine hundred ninety-nine", "neunhundertneunundneunzig",
         "neuf cent quatre-vingt-dix-neuf"),
    ],
)  # fmt: skip
def test_numbers_in_words(
    problems: Any, number: int, english: str, german: str, french: str
) -> None:
    assert problems.english(number) == english
    assert problems.german(number) == german
    assert problems.french(number) == french


def test_nothing_of_the_users_is_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_family(out)
    with pytest.raises(UsageError, match="already exists — .*--overwrite"):
        write_family(out)
    (out / "mine.txt").write_text("mine", encoding="utf-8")
    (out / "recipe.yaml").write_text("changed", encoding="utf-8")
    write_family(out, overwrite=True)
    assert (out / "mine.txt").read_text(encoding="utf-8") == "mine"
    assert (out / "recipe.yaml").read_bytes() == (FAMILY / "recipe.yaml").read_bytes()
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(UsageError, match="not a folder that the demo has made"):
        write_family(other, overwrite=True)
    assert list(other.iterdir()) == []


def test_an_existing_folder_is_refused_before_libraries_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "merge_cli.demo.run", None)  # importing it would fail
    with pytest.raises(UsageError, match="already exists"):
        demo_command(tmp_path)


def result(out: Path, right: dict[str, Sequence[float]]) -> Demo:
    """A demo whose models have given these answers to two tasks alike."""
    roles: dict[str, Role] = {"base": "base", "merged": "recipe"}
    entries = []
    for name, hits in right.items():
        metric = Metric("exact_match", "of questions", "higher", hits, [1.0] * len(hits))
        tasks = {
            task: TaskResult(task, "exact_match", {"exact_match": metric}, []) for task in EXPERTS
        }
        evaluation = Evaluation(name, name, "cpu", "float32", tasks)
        entries.append(ModelEntry(name, roles.get(name, "source"), name, evaluation))
    return Demo(out, Comparison(tuple(entries), {}), {}, ())


def test_a_merge_that_does_not_win_is_not_recommended() -> None:
    half = [1.0, 0.0] * 50
    demo = result(
        Path("out"),
        {"base": [0.0] * 100, "german": half, "french": [0.0] * 100, "merged": half[::-1]},
    )
    assert [rival.beaten for rival in demo.rivals] == [False, True, True]
    sentence = verdict(demo)
    assert sentence.startswith(f"Use {Path('out/german')}: the merge's mean is 0 points")
    assert "not more than chance" in sentence


class Browser:
    """Notes what would be opened."""

    def __init__(self) -> None:
        self.opened: list[str] = []

    def open(self, address: str) -> bool:
        self.opened.append(address)
        return True


@pytest.fixture
def browser(monkeypatch: pytest.MonkeyPatch, demo: Demo) -> Browser:
    browser = Browser()
    monkeypatch.setattr("webbrowser.open", browser.open)
    monkeypatch.setattr("merge_cli.demo.run.run_demo", lambda *args, **options: demo)
    return browser


def test_the_command_prints_a_table_and_one_sentence(browser: Browser, demo: Demo) -> None:
    done = CliRunner().invoke(app, ["demo"], env={"COLUMNS": "80"})
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    head = next(i for i, line in enumerate(lines) if line.split()[:1] == ["model"])
    assert lines[head].split() == ["model", "german", "french", "mean"]
    shown = [line.split()[0] for line in lines[head + 1 : head + 5]]
    assert shown == ["base", "german", "french", "merged"]
    assert verdict(demo) in done.output.replace("\n", " ")
    assert str(demo.page) in done.output
    assert browser.opened == []  # no terminal


def test_the_report_opens_where_somebody_can_see_it(
    browser: Browser, demo: Demo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(screen, "can_open_pages", lambda: True)
    assert CliRunner().invoke(app, ["demo", "--no-open"]).exit_code == 0
    assert browser.opened == []
    assert CliRunner().invoke(app, ["demo"]).exit_code == 0
    assert browser.opened == [demo.page.absolute().as_uri()]


@pytest.mark.parametrize(
    ("environment", "terminal", "expected"),
    [
        ({"DISPLAY": ":0"}, True, True),
        ({"WAYLAND_DISPLAY": "wayland-0"}, True, True),
        ({"DISPLAY": ":0", "CI": "true"}, True, False),
        ({"DISPLAY": ":0"}, False, False),
        ({}, True, sys.platform == "darwin"),
    ],
)
def test_when_a_page_can_be_opened(
    environment: dict[str, str],
    terminal: bool,
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    assert screen.can_open_pages(environment) is expected
