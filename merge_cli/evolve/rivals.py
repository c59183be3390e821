"""The result of a search beside its rivals, which need no search, on rows that chose nothing.

The rivals are the uniform soup, task arithmetic, the best static merge of those that the search
began with, Fisher where there is data, and every source by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from merge_cli.evaluation.result import Metric
from merge_cli.evolve.jobs import EvaluationJob
from merge_cli.evolve.journal import Evaluations
from merge_cli.evolve.loop import Candidate, best_first
from merge_cli.evolve.objectives import Values
from merge_cli.evolve.plan import SearchPlan
from merge_cli.evolve.record import FOUND, add_interval, build_record
from merge_cli.evolve.references import References
from merge_cli.evolve.static import BASE, FISHER
from merge_cli.options import MergeOptions
from merge_cli.recipe.schema import Recipe
from merge_cli.recipe.values import Parameter

_LAMBDA = 0.4  # of the task arithmetic that every search is compared with, as in `compare`


@dataclass(frozen=True)
class SearchOutcome:
    """What a search has evaluated, and what it chose.

    Attributes:
        proposed: by the optimizer; `statics` need no search.
        ended: why the search ended.
    """

    decided: SearchPlan
    proposed: tuple[Candidate, ...]
    statics: tuple[Candidate, ...]
    best: Candidate
    ended: str


def judge(
    outcome: SearchOutcome,
    recipe: Recipe,
    evaluations: Evaluations,
    references: References,
    *,
    lines: Sequence[Mapping[str, Any]],
    seconds: float,
    options: MergeOptions,
) -> dict[str, Any]:
    """Evaluate the result and its rivals on the report's split; the record for the report.

    Args:
        recipe: the result's static recipe.
        lines: of the journal, which grows while the rivals are evaluated.
        seconds: how long the search has taken.
    """
    decided = outcome.decided
    split = decided.objective.report
    searched = _cost(lines, ("static", "candidate", "validation"))
    compared, metrics = _compare(outcome, recipe, evaluations, references)
    rivals = {name: values for name, values in compared.items() if name != FOUND}
    evaluated = [*outcome.statics, *outcome.proposed]
    cost = {
        "evaluations": len(evaluated),
        "static_evaluations": len(outcome.statics),
        "failed": sum(bool(item.outcome.error) for item in evaluated),
        **searched,
        "report_tokens": _cost(lines, ("report",))["tokens"],
        "workers": decided.search.workers,
        "wall_seconds": round(seconds, 3),
        "resumed": evaluations.reused,
        "residency": decided.residency.residency,
        "peak_vram": _peak_vram(options),
    }
    record = build_record(
        decided,
        outcome.proposed,
        outcome.statics,
        outcome.best,
        outcome.ended,
        compared,
        rivals,
        references.base(split),
        cost,
    )
    record["best"]["genome"] = outcome.best.genome
    add_interval(record, split, metrics)
    return record


def _compare(
    outcome: SearchOutcome, recipe: Recipe, evaluations: Evaluations, references: References
) -> tuple[dict[str, Values], dict[str, Sequence[Metric]]]:
    """Values and each goal's metric: of the result, of its rivals, and of every source."""
    split = outcome.decided.objective.report
    merges = {FOUND: recipe, **_rivals(outcome, references)}
    jobs = [
        EvaluationJob(i, item, split.name, keep_examples=True)
        for i, item in enumerate(merges.values())
    ]
    genome = [FOUND, outcome.best.number, *outcome.best.genome]
    about = [{"merge": name, "genome": genome if name == FOUND else [name]} for name in merges]
    outcomes = dict(zip(merges, evaluations.of("report", jobs, about), strict=True))
    values = {name: item.values for name, item in outcomes.items() if not item.error}
    metrics: dict[str, Sequence[Metric]] = {name: o.metrics for name, o in outcomes.items()}
    for source in references.all():
        values[source.label] = references.values(source, split)
        metrics[source.label] = references.metrics(source, split)
    return values, metrics


def _rivals(outcome: SearchOutcome, references: References) -> Mapping[str, Recipe]:
    """The merges that the result has to beat."""
    original = outcome.decided.recipe
    plain = tuple(replace(spec, parameters={}) for spec in original.models)
    merges = {"uniform soup": original.with_result("soup", models=plain, parameters={})}
    if original.base_model is not None:
        scale = {"lambda": Parameter("lambda", _LAMBDA, "parameters.lambda")}
        merges[f"task arithmetic {_LAMBDA:g}"] = original.with_result(
            "task_arithmetic", models=plain, parameters=scale
        )
    scored = best_first(outcome.statics)
    labels = [source.label for source in references.all()]
    # The best by the rows that were searched on, and Fisher, which no space can express.
    for item in [*scored[:1], *(c for c in scored if c.static and c.static.name == FISHER)]:
        if item.static and item.static.name not in [*merges, *labels, BASE]:
            merges[item.static.name] = item.static.recipe
    return merges


def _cost(lines: Sequence[Mapping[str, Any]], kinds: Sequence[str]) -> dict[str, Any]:
    chosen = [line for line in lines if line["kind"] in kinds]
    return {
        "seconds": round(sum(line["seconds"] for line in chosen), 3),
        "tokens": sum(line["tokens"] for line in chosen),
        "forward_passes": sum(line["passes"] for line in chosen),
    }


def _peak_vram(options: MergeOptions) -> int | None:
    if options.device == "cpu":
        return None
    import torch

    return int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else None
