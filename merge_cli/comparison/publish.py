"""Compare, and write down what was found: what notebooks and the command line call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_cli.errors import UsageError
from merge_cli.options import OnProgress, Progress, ignore_progress
from merge_cli.planning.planner import load_recipe

if TYPE_CHECKING:
    from merge_cli.comparison.result import Comparison
    from merge_cli.evaluation.spec import EvalSpec
    from merge_cli.evaluation.task import Task


@dataclass(frozen=True)
class ComparisonResult:
    """A finished comparison: its folder, what was found, and the content of comparison.json."""

    path: Path
    comparison: Comparison
    record: dict[str, Any]
    unmet: dict[str, list[str]] = field(default_factory=dict)

    def _repr_html_(self) -> str | None:
        """The comparison's page, in a notebook."""
        from merge_cli.report.notebook import framed

        return framed(self.path / "comparison.html")

    def __str__(self) -> str:
        """The table and the verdict, as in comparison.md."""
        from merge_cli.comparison.tables import markdown

        return markdown(self.record)

    def require_gates(self) -> None:
        """Raise a GateError if a recipe's merge does not meet a gate."""
        from merge_cli.evaluation.gates import require

        require(self.unmet)


def compare(
    recipes: Sequence[str | Path],
    tasks: str | Path | EvalSpec | Sequence[str | Path | Task],
    out: str | Path,
    *,
    limit: int | None = None,
    gates: Sequence[str] = (),
    no_worse: Sequence[str] = (),
    options: Sequence[str] = (),
    ray: str | None = None,
    on_progress: OnProgress | None = None,
) -> ComparisonResult:
    """Merge recipes, evaluate base, parents, baselines and merges on the same data, write it down.

    Args:
        tasks: as `evaluate` takes them.
        out: the folder for merges, comparison.json, .md, .csv and .html; what is there is reused.
        limit: at most so many rows of each task, a random sample.
        gates, no_worse: conditions on every recipe's merge (docs/evaluate.md).
        options: of `merge-cli run`, for every merge.
        ray: the address of a Ray cluster that merges and evaluates.
        on_progress: called with each progress.

    Raises:
        as `comparison.run.compare` does; UsageError for a gate that cannot be read. A gate that is
        not met raises nothing here: see `ComparisonResult.require_gates`.
    """
    from merge_cli.comparison.files import write_comparison
    from merge_cli.comparison.run import compare as compare_recipes
    from merge_cli.evaluation.gates import read_gates
    from merge_cli.evaluation.run import as_spec

    if not recipes:
        raise UsageError("nothing to compare: no recipe", hint="Name one recipe or more.")
    spec = as_spec(tasks).limited(limit)
    conditions = read_gates(gates, no_worse, spec.tasks)
    references = [gate.reference for gate in conditions if gate.reference]
    report = on_progress or ignore_progress
    result = compare_recipes(
        recipes,
        spec,
        out,
        references=references,
        options=options,
        ray=ray,
        on_progress=report,
    )
    report(Progress("intervals and page", 0, 0, model="all models"))
    return ComparisonResult(
        Path(out), result, write_comparison(result, Path(out)), result.unmet(conditions)
    )


def comparison_spec(
    recipes: Sequence[str | Path], eval_file: Path | None, data: Sequence[Path]
) -> EvalSpec:
    """What to compare on: flags, or else the one `eval` section that recipes have.

    Raises:
        UsageError: none, or several that differ.
    """
    from merge_cli.evaluation.run import spec_for

    if "-" in map(str, recipes):
        raise UsageError("a comparison reads recipes from files, not from standard input")
    specs = [spec for path in recipes if (spec := spec_for(load_recipe(path), eval_file, data))]
    if not specs:
        hint = "Give --data FILE or --eval FILE (docs/evaluate.md), or `eval:` in a recipe."
        raise UsageError("nothing to compare on", hint=hint)
    if any(spec.changed(file="") != specs[0].changed(file="") for spec in specs):
        hint = "Say which tasks count with --eval FILE."
        raise UsageError("the recipes have different `eval` sections", hint=hint)
    return specs[0]
