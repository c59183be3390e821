"""The façade's functions: what a notebook or another program calls."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_cli.engine.merge import execute
from merge_cli.engine.options import MergeOptions, Progress
from merge_cli.engine.outcome import Outcome
from merge_cli.engine.plan import Plan
from merge_cli.engine.planner import DEFAULT_SHARD_SIZE, load_recipe, make_plan
from merge_cli.recipe.schema import Recipe


@dataclass(frozen=True)
class MergeResult:
    """A finished merge: its folder and the content of its merge_report.json."""

    path: Path
    report: dict[str, Any]


def plan(recipe: Recipe | str | Path, *, shard_size: int = DEFAULT_SHARD_SIZE) -> Plan:
    """Decide a merge from headers alone: every tensor, and every problem.

    Args:
        recipe: a loaded recipe, or the path of one.
        shard_size: bytes of tensors in one output file.

    Raises:
        RecipeError, SourceError, MismatchError: see `merge_cli.errors`.
    """
    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    return make_plan(loaded, shard_size=shard_size)


def merge(
    recipe: Recipe | Plan | str | Path,
    out: str | Path,
    *,
    shard_size: int = DEFAULT_SHARD_SIZE,
    options: MergeOptions | None = None,
    show: Callable[[Progress], None] = lambda progress: None,
) -> MergeResult:
    """Merge models into the folder `out`.

    Args:
        recipe: a plan, a loaded recipe, or the path of one.
        out: the folder to publish; it appears only when it is complete.
        show: told of progress.

    Raises:
        RecipeError, SourceError, MismatchError, NonFiniteError, ResourceError, Interrupted: see
        `merge_cli.errors`. After the last four, the same call resumes.
    """
    from merge_cli.report.write import write_reports

    decided = recipe if isinstance(recipe, Plan) else plan(recipe, shard_size=shard_size)
    report: dict[str, Any] = {}
    target = Path(out)

    def finish(of: Plan, prints: tuple[str, ...], outcome: Outcome, folder: Path) -> None:
        report.update(write_reports(of, prints, outcome, folder, target.absolute()))

    path = execute(decided, target, options or MergeOptions(), show=show, finish=finish)
    if not report:  # published by a process that was killed before it could say so
        report.update(json.loads((path / "merge_report.json").read_text(encoding="utf-8")))
    return MergeResult(path, report)
