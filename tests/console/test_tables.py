"""What the console writes faster than the libraries would: it must be what they would write."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from merge_cli.comparison.cost import MergeCost
from merge_cli.comparison.files import comparison_record
from merge_cli.comparison.result import Comparison, ModelEntry, Role
from merge_cli.console.evaluations import print_comparison, print_evaluations
from merge_cli.console.tables import indented, print_table
from merge_cli.evaluation.result import Evaluation, Metric, TaskResult
from merge_cli.system.terminal import fold_comments, print_wrapped
from tests.support.paths import ROOT

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
documents = st.recursive(
    scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20
)


def printed(console: Console) -> str:
    """What a console over a string has printed."""
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@given(documents)
def test_indented_is_json(document: Any) -> None:
    assert indented(document) == json.dumps(document, indent=1, ensure_ascii=False)


def test_indented_writes_what_is_shared_at_every_depth() -> None:
    shared = {"weight": [0.5, 1], "é": []}
    document = {"a": shared, "b": [shared, shared, (1, shared)], "c": {}}
    assert indented(document) == json.dumps(document, indent=1, ensure_ascii=False)


ROWS = [
    ("model.layers.0 … 3", "36", "1,024", "BF16", "merge", "weight 0.5 0.3"),
    ("[bold]no markup[/bold] :smile:", "1", "7", "F32, BF16", "copy, merge", ""),
    ("ünïcode.名前.weight", "1", "12,345,678", "BF16", "merge", "stored as BF16, F32"),
]
FOLDED = [("a" * 70, "1", "1", "BF16", "merge", "x " * 40)]
LINES = [("layers", "2", "2", "BF16", "merge", "1× this\n1× that")]
ODD = [("tab\tand \x1b[1mescape", "1", "1", "BF16", "merge", "")]


def a_table() -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, head in enumerate(("layers", "tensors", "parameters", "dtype", "action", "with")):
        table.add_column(head, overflow="fold", justify="right" if i in (1, 2) else "left")
    return table


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize(
    "rows", [ROWS, ROWS + FOLDED, ROWS + LINES, ROWS + ODD, []],
    ids=["plain", "folded", "lines", "odd", "none"],
)  # fmt: skip
def test_tables_are_what_rich_prints(rows: Sequence[tuple[str, ...]], terminal: bool) -> None:
    def console() -> Console:
        return Console(file=io.StringIO(), width=100, force_terminal=terminal, emoji=False,
                       soft_wrap=not terminal)  # fmt: skip

    ours, richs = console(), console()
    print_table(ours, a_table(), rows)
    table = a_table()
    for row in rows:
        table.add_row(*map(escape, row))
    richs.print(table)
    assert printed(ours) == printed(richs)


@pytest.mark.parametrize("width", [80, 100, 120])
@pytest.mark.parametrize("several", [False, True])
def test_no_digit_of_an_evaluation_is_left_out(width: int, several: bool) -> None:
    row = {"value": 0.41441, "interval": [0.40051, 0.42851], "unit": "nats per token",
           "better": "lower"}  # fmt: skip
    against = row | {"difference": -0.15472, "difference_interval": [-0.16101, -0.14821]}
    note = "3 of 7 prompts are longer than 60 tokens: their beginning was cut, and that is much"

    def model(name: str, of: object) -> dict[str, Any]:
        task = {"metrics": {"bits_per_byte": of}, "examples": 1234, "notes": [note],
                "cached": False, "cost": {"tokens": 1, "seconds": 1.0}}  # fmt: skip
        return {"model": name, "dtype": "float32", "device": "cpu",
                "tasks": {"japanese-with-a-long-name": task}}  # fmt: skip

    console = Console(width=width, file=io.StringIO(), record=True)
    print_evaluations(console, [model("zoo/math", row), model("zoo/base", against)][: 1 + several])
    text = console.export_text()
    digits = ["0.4144", "0.4005", "0.4285", "1234"]
    for number in [*digits, *(["−0.1547", "−0.161", "−0.1482"] if several else [])]:
        assert number in text
    assert max(map(len, text.splitlines())) <= width
    assert " ".join(text.split()).count(note) == 1 + several


def test_a_terminal_wraps_between_words_and_breaks_no_path() -> None:
    path = "/models/" + "a-very-long-name/" * 3 + "model.safetensors"
    console = Console(width=40, file=io.StringIO(), force_terminal=False)
    print_wrapped(console, f"[bold]Input error:[/bold] truncated — {path} — Copy it again.", 2)
    assert printed(console).splitlines() == [
        "  Input error: truncated —",
        f"  {path}",
        "  — Copy it again.",
    ]


def test_a_pipe_gets_one_line() -> None:
    console = Console(width=40, file=io.StringIO(), soft_wrap=True)
    print_wrapped(console, "a word " * 20)
    assert printed(console).count("\n") == 1


def test_a_share_keeps_its_unit() -> None:
    console = Console(width=20, file=io.StringIO(), force_terminal=False)
    print_wrapped(console, "the embedding: 66.9 %, and the rest")
    assert printed(console).splitlines() == [
        "the embedding:",
        "66.9 %, and the rest",
    ]


COMMENTED = """\
# A comment that is far too long for this terminal, and has to be folded.
models: [a, b] # a remark behind a value, which moves above it
  key: "a # in quotes" # so this line of more than forty stays as it is
short: 1 # stays
"""


def test_comments_fold_and_values_do_not() -> None:
    folded = fold_comments(COMMENTED, 40)
    assert folded.splitlines() == [
        "# A comment that is far too long for",
        "# this terminal, and has to be folded.",
        "# a remark behind a value, which moves",
        "# above it",
        "models: [a, b]",
        '  key: "a # in quotes" # so this line of more than forty stays as it is',
        "short: 1 # stays",
    ]


@pytest.mark.parametrize("width", [20, 40, 78])
@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_a_folded_example_means_the_same(path: Path, width: int) -> None:
    text = path.read_text(encoding="utf-8")
    assert list(yaml.safe_load_all(fold_comments(text, width))) == list(yaml.safe_load_all(text))


def compared(width: int, names: Sequence[str]) -> str:
    """A comparison of merges in a terminal of this width."""

    def entry(name: str, role: Role, values: tuple[float, float]) -> ModelEntry:
        tasks = {}
        for task, value in zip(("german", "french"), values, strict=True):
            hits = [float(i < 100 * value) for i in range(100)]
            metric = Metric("exact_match", "of questions", "higher", hits, [1.0] * 100)
            tasks[task] = TaskResult(task, "exact_match", {"exact_match": metric}, [])
        cost = MergeCost(4.7, 0, 0, 0, 195_000_000, None, None) if role == "recipe" else None
        return ModelEntry(
            name, role, name, Evaluation(name, name, "cpu", "float32", tasks), cost=cost
        )  # fmt: skip

    entries = [
        entry("base", "base", (0.46, 0.49)),
        entry("german", "source", (0.87, 0.36)),
        entry("french", "source", (0.4, 0.9)),
        *(entry(name, "recipe", (0.7 + i / 50, 0.7)) for i, name in enumerate(names)),
    ]
    record = comparison_record(
        Comparison(tuple(entries), {"german": "german", "french": "french"}, "average")
    )
    console = Console(width=width, file=io.StringIO(), record=True)
    print_comparison(console, record)
    return console.export_text()


def test_a_comparison_folds_between_words_and_shows_every_column() -> None:
    text = compared(80, ["task arithmetic 0.4", "average", "recipe"])
    table = text[: text.index("\n\n")]
    assert max(map(len, table.splitlines())) <= 80
    words = {"normalised", "better", "than", "average", "time", "peak", "memory", "arithmetic"}
    assert words <= set(table.split())
    assert "195 MB" in table


def test_a_comparison_in_a_wide_terminal_has_heads_of_one_line() -> None:
    assert "better than" in compared(200, ["average", "recipe"]).splitlines()[0]
