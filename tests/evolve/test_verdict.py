"""Whether a search was worth it, in words: a gain is positive, and so is its interval."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from merge_cli.evolve.panel import print_searched
from merge_cli.evolve.verdict import gain_in_words, verdict_in_words

VERDICT: dict[str, Any] = {
    "score": -0.718, "best_static": "task arithmetic 0.6", "best_static_score": -0.712,
    "difference": -0.006, "interval": [-0.032, 0.022], "better": True, "confirmed": False,
}  # fmt: skip


def test_a_gain_is_inside_its_interval() -> None:
    assert gain_in_words(VERDICT) == "0.006 (95 % interval −0.022 to 0.032)"
    assert gain_in_words({**VERDICT, "interval": None}) == "0.006"
    assert gain_in_words({**VERDICT, "difference": 0.0, "interval": [0.0, 0.0]}) == (
        "0 (95 % interval 0 to 0)"
    )


def test_the_score_says_which_way_is_better() -> None:
    text = verdict_in_words({"split": "test", "verdict": VERDICT})
    assert text.startswith("test score −0.718, lower is better; the best without a search is ")
    assert text.endswith("task arithmetic 0.6, −0.712; gain 0.006 (95 % interval −0.022 to 0.032)")


def test_what_is_maximised_is_read_without_its_minus() -> None:
    text = verdict_in_words({"split": "test", "verdict": VERDICT, "maximised": True})
    assert text.startswith("test score 0.718, higher is better; the best without a search is ")
    assert text.endswith("task arithmetic 0.6, 0.712; gain 0.006 (95 % interval −0.022 to 0.032)")


@pytest.mark.parametrize(
    ("better", "confirmed", "mark"),
    [(True, True, "✓"), (True, False, "–"), (False, False, "✗ NO IMPROVEMENT:")],
)
def test_only_a_confirmed_gain_gets_a_tick(better: bool, confirmed: bool, mark: str) -> None:
    verdict = {**VERDICT, "better": better, "confirmed": confirmed}
    cost = {"evaluations": 40, "seconds": 9.0, "failed": 0, "tokens": 100}
    console = Console(width=200, record=True)
    search = {"cost": cost, "verdict": verdict, "split": "test", "ended": "all are used"}
    print_searched(console, search)
    assert f"\n{mark} test score" in console.export_text()
