"""The demo: write the family, merge it, measure base, experts and merge, and say who wins.

Everything but the folder's files is what other commands do: `run`, `evaluate`, and the page of
`compare`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_cli.api import merge
from merge_cli.comparison.cost import MergeCost
from merge_cli.comparison.files import write_comparison
from merge_cli.comparison.result import Comparison, ModelEntry, Role
from merge_cli.demo.folder import BASE, DATA, EXPERTS, RECIPE, TASKS, write_family
from merge_cli.evaluation.parse import read_eval
from merge_cli.evaluation.rows import read_rows
from merge_cli.evaluation.run import evaluate_all
from merge_cli.evaluation.summary import Interval, interval
from merge_cli.options import MergeOptions, OnProgress, ignore_progress
from merge_cli.planning.planner import load_recipe
from merge_cli.system.libraries import require

MERGED = "merged"
PAGE = "comparison.html"


@dataclass(frozen=True)
class Rival:
    """The merge's mean minus another model's, with its paired 95 % interval."""

    name: str
    gain: float
    interval: Interval

    @property
    def beaten(self) -> bool:
        """Whether the merge is better by more than chance."""
        return self.interval.low > 0


@dataclass(frozen=True)
class Demo:
    """What the demo has found.

    Attributes:
        out: its folder.
        comparison: base, experts and the merge on the test rows.
        record: the content of comparison.json.
        questions: of each task the first test row that models answer differently: its prompt, and
            every model's answer by name.
    """

    out: Path
    comparison: Comparison
    record: dict[str, Any]
    questions: Sequence[tuple[str, dict[str, str]]]

    @property
    def page(self) -> Path:
        return self.out / PAGE

    @property
    def merged(self) -> Path:
        return self.out / MERGED

    @property
    def rivals(self) -> list[Rival]:
        """Base and experts, the one with the best mean first."""
        averages = self.comparison.averages
        merged = averages[MERGED]
        others = [name for name in averages if name != MERGED]
        others.sort(key=lambda name: -averages[name].value)
        return [
            Rival(
                name,
                merged.value - averages[name].value,
                interval(merged.draws - averages[name].draws),
            )
            for name in others
        ]


def run_demo(
    out: Path,
    *,
    options: MergeOptions | None = None,
    overwrite: bool = False,
    on_progress: OnProgress = ignore_progress,
    on_evaluation: OnProgress = ignore_progress,
) -> Demo:
    """Write the family to `out`, merge it, evaluate four models, and write the comparison.

    Args:
        options: of the merge.
        overwrite: replace what an earlier demo has left in `out`.

    Raises:
        as `write_family`, `api.merge` and `evaluate` do.
    """
    for library in ("torch", "transformers"):
        require(library, "the demo")
    options = options or MergeOptions(overwrite=overwrite)
    write_family(out, overwrite=overwrite)
    recipe = load_recipe(out / RECIPE)
    began = time.monotonic()
    result = merge(recipe, out / MERGED, options=options, on_progress=on_progress)
    seconds = time.monotonic() - began
    cost = MergeCost(seconds, 0, 0, 0, result.report["cost"]["peak_rss"], None, None)
    spec = read_eval(out / TASKS).changed(device=options.device, threads=options.threads)
    names = (BASE, *EXPERTS, MERGED)
    paths = {name: os.path.join(out, name) for name in names}
    evaluations = evaluate_all(list(paths.values()), spec, on_evaluation)
    text = (out / RECIPE).read_text(encoding="utf-8")
    roles: dict[str, Role] = {BASE: "base", MERGED: "recipe"}
    entries = [
        ModelEntry(
            name,
            roles.get(name, "source"),
            paths[name],
            evaluations[paths[name]],
            method=recipe.merge_method if name == MERGED else "",
            recipe=text if name == MERGED else "",
            cost=cost if name == MERGED else None,
        )
        for name in names
    ]
    comparison = Comparison(tuple(entries), {name: name for name in EXPERTS})
    return Demo(out, comparison, write_comparison(comparison, out), _telling_rows(comparison, out))


def _telling_rows(comparison: Comparison, out: Path) -> list[tuple[str, dict[str, str]]]:
    """The first test row of each task that models answer differently: the prompt, the answers."""
    questions = []
    for task in comparison.tasks:
        examples = {e.name: e.evaluation[task].examples for e in comparison.entries}
        for number, row in enumerate(read_rows(out / DATA / f"{task}.test.jsonl")):
            answers = {name: str(rows[number]["found"]) for name, rows in examples.items()}
            if len(set(answers.values())) > 1:
                questions.append((row.text("prompt"), answers))
                break
    return questions


def verdict(demo: Demo) -> str:
    """One sentence: what to use, what it gains on each subject, whether by more than chance."""
    scores, best = demo.comparison.scores, demo.rivals[0]
    ends = f"{_points(best.interval.low)} to {_points(best.interval.high)}"
    if best.beaten:
        gains = " and ".join(
            f"{_points(scores[MERGED, task].value - scores[BASE, task].value)} points on {task}"
            for task in demo.comparison.tasks
        )
        return (
            f"Use {demo.merged}: over the base it gains {gains}, and its mean is "
            f"{_points(best.gain)} points above that of {best.name}, the best of the others "
            f"(95 % interval {ends}: more than chance)."
        )
    return (
        f"Use {demo.out / best.name}: the merge's mean is {_points(best.gain)} points above its "
        f"(95 % interval {ends}: not more than chance)."
    )


def _points(share: float) -> str:
    """A difference of shares in percentage points."""
    return f"{100 * share:.0f}".replace("-", "−")
