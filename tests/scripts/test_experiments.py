"""The experiments on budgets and cheaper evaluations: what is counted, and what tables say."""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

import pytest

from tests.support.paths import ROOT

DOCS = ROOT / "docs" / "experiments"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "experiments"))
    for name in ("budget", "dam", "evolve", "examples", "fidelity"):
        sys.modules.pop(name, None)
    return importlib.import_module


def test_what_a_training_costs(scripts: Any) -> None:
    budget = scripts("budget")
    training = {
        "datasets": [{"train_tokens": 100, "held_out_tokens": 10},
                     {"train_tokens": 50, "held_out_tokens": 20}],
        "measured": [{}, {}, {}],
        "cost": {"tokens": 150},
    }  # fmt: skip
    # Forward and backward: 3 * 150; teachers: 150 + 30; held-out measurements: 3 * 30.
    assert budget.dam_cost(training) == 450 + 180 + 90


def test_the_tables_say_what_was_measured(scripts: Any) -> None:
    """The committed pages are what the committed numbers come to."""
    for name, make in (("budget", "table"), ("fidelity", "tables")):
        module = scripts(name)
        results = json.loads((DOCS / f"{name}.json").read_text())
        if name == "fidelity":
            results = {**results}
        shown = getattr(module, make)(results)
        assert shown in (DOCS / f"{name}.md").read_text(encoding="utf-8")
    examples = scripts("examples")
    results = json.loads((DOCS / "statistics.json").read_text())
    page = (DOCS / "statistics.md").read_text(encoding="utf-8")
    assert examples.table(results) in page
    assert examples.counts(results) in page


def test_costs_are_equal_and_no_way_is_given_more(scripts: Any) -> None:
    budget = scripts("budget")
    results = json.loads((DOCS / "budget.json").read_text())
    for examples in budget.BUDGETS:
        dam = budget.runs_of(results, budget.DAM, examples)
        for space in budget.SPACES:
            for ours, theirs in zip(dam, budget.runs_of(results, space, examples), strict=True):
                assert 0.9 * ours["tokens"] < theirs["tokens"] <= ours["tokens"]


def test_a_rejection_is_judged_by_all_rows(scripts: Any) -> None:
    fidelity = scripts("fidelity")
    pair = {
        "off": {"history": [{"score": s, "share": 1.0} for s in (1.0, 4.0, 2.0, 3.0)]},
        "on": {"history": [{"score": None, "share": s} for s in (0.25, 1.0, 1.0, 0.25)]},
    }
    found = fidelity.ruled_out(pair)
    assert found == {"rejected": 2, "best_kept": False, "lost": 1.0, "wrong": 0.5}
