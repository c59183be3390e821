"""The record of a search: what the report shows, and whether it was worth it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from merge_cli.engine.memory import peak_rss
from merge_cli.errors import GateError
from merge_cli.evaluation.result import Metric
from merge_cli.evaluation.summary import Interval, interval, resampled
from merge_cli.evolve.importance import importance
from merge_cli.evolve.loop import Candidate, best_first
from merge_cli.evolve.objectives import Split, Values, sign_of
from merge_cli.evolve.plan import SearchPlan
from merge_cli.evolve.space import plain_values
from merge_cli.evolve.verdict import gain_in_words, shown

FOUND = "found"


def history(
    candidates: Sequence[Candidate], statics: Sequence[Candidate] = ()
) -> list[dict[str, Any]]:
    """One entry for each candidate: its score, and the best one so far, static merges included."""
    best: Candidate | None = next(iter(best_first(statics)), None)
    result = []
    for candidate in candidates:
        if candidate.score is not None and (best is None or candidate.rank_key < best.rank_key):
            best = candidate
        result.append(
            {
                "number": candidate.number,
                "generation": candidate.generation,
                "score": candidate.score.total if candidate.score else None,
                "parts": list(candidate.score.parts) if candidate.score else None,
                "violation": candidate.score.violation if candidate.score else None,
                "best": best.score.total if best and best.score else None,
                "share": candidate.share,
                "error": candidate.outcome.error,
            }
        )
    return result


def front(candidates: Sequence[Candidate]) -> list[int]:
    """Numbers of the candidates that none is better than in every goal."""
    scored = [c for c in candidates if c.score is not None and not c.score.violation]
    result = []
    for item in scored:
        assert item.score is not None
        parts = item.score.parts
        if not any(
            c.score is not None
            and c.score.parts != parts
            and all(a <= b for a, b in zip(c.score.parts, parts, strict=True))
            for c in scored
        ):
            result.append(item.number)
    return result


def build_record(
    decided: SearchPlan,
    candidates: Sequence[Candidate],
    statics: Sequence[Candidate],
    best: Candidate,
    ended: str,
    compared: Mapping[str, Values],
    references: Mapping[str, Values],
    base: Values | None,
    cost: Mapping[str, Any],
) -> dict[str, Any]:
    """JSON-ready; docs/evolve.md says what each part is.

    Args:
        statics: the merges that need no search, on the split search.
        compared: models by name on the report's split; FOUND is the result.
        references: of those the ones that nothing was searched for.
        base: the base on that split, for constraints.
    """
    split, space = decided.objective.report, decided.space
    scores = {
        name: {"score": split.score(values, base).total, "tasks": primary(values)}
        for name, values in compared.items()
    }
    scored = best_first(candidates)
    genes = [space.describe(gene) for gene in space.genes] if space else list(decided.labels)
    shares = importance(
        [c.genome for c in scored], [c.score.total for c in scored if c.score is not None]
    )
    static = best.static.name if best.static else ""
    values: Mapping[str, Any] = (
        (plain_values(space, best.genome) if best.genome else {})
        if space
        else dict.fromkeys(decided.labels, False)
        if not best.genome
        else {name: bool(u) for name, u in zip(decided.labels, best.genome, strict=True)}
    )
    assert best.score is not None
    warnings = list(decided.warnings)
    result = verdict(scores, references)
    if static:
        warnings.append(
            f"THE RESULT IS A STATIC MERGE, {static}: no candidate of the search is better"
        )
    if best.score.violation:
        warnings.append(
            "NO CANDIDATE keeps the constraints; the one that breaks them least is taken"
        )
    reported = split.score(compared[FOUND], base).violation if FOUND in compared else 0.0
    if reported and split.name != "search":
        warnings.append(f"BREAKS A CONSTRAINT on the split {split.name}")
    return {
        "method": decided.recipe.merge_method,
        "searched": list(decided.search.method) or ["soup"],
        "optimizer": decided.search.optimizer if space else "greedy",
        "ended": ended,
        "goals": [goal.task for goal in decided.objective.search.weighted],
        "genes": genes,
        "importance": dict(zip(genes, shares, strict=True)) if space and any(shares) else {},
        "static": [
            {
                "name": item.static.name,
                "score": item.score.total if item.score else None,
                "in_space": bool(item.genome),
            }
            for item in statics
            if item.static
        ],
        "history": history(candidates, statics),
        "front": front(candidates),
        "best": {
            "number": best.number,
            "static": static,
            "score": best.score.total,
            "violation": best.score.violation,
            "reported_violation": reported,
            "values": values,
        },
        "maximised": _is_maximised(decided, best, compared),
        "split": split.name,
        "scores": scores,
        "verdict": result,
        "warnings": warnings,
        "cost": {**cost, "peak_rss": peak_rss()},
    }


def _is_maximised(decided: SearchPlan, best: Candidate, compared: Mapping[str, Values]) -> bool:
    """Whether people read all scores without their minus: those of the search and the verdict."""
    reported = [decided.objective.report.is_maximised(values) for values in compared.values()]
    return decided.objective.search.is_maximised(best.outcome.values) and all(reported)


def primary(values: Values) -> dict[str, float]:
    """Each task's first metric."""
    return {name: next(iter(metrics.values())).value for name, metrics in values.items()}


def verdict(
    scores: Mapping[str, Mapping[str, Any]], references: Mapping[str, Values]
) -> dict[str, Any] | None:
    """The result against the best that needs no search; None where there is nothing else."""
    static = {name: scores[name]["score"] for name in references}
    if not static or FOUND not in scores:
        return None
    name = min(static, key=lambda reference: static[reference])
    score = scores[FOUND]["score"]
    return {
        "score": score,
        "best_static": name,
        "best_static_score": static[name],
        "better": score < static[name],
    }


def add_interval(
    record: dict[str, Any], split: Split, metrics: Mapping[str, Sequence[Metric]]
) -> None:
    """Add the paired interval of the verdict's difference, and a warning where it contains 0."""
    verdict = record["verdict"]
    if verdict is None:
        return
    bounds = paired_interval(split, metrics[FOUND], metrics[verdict["best_static"]])
    verdict["difference"] = verdict["score"] - verdict["best_static_score"]
    verdict["interval"] = None if bounds is None else [bounds.low, bounds.high]
    verdict["confirmed"] = bounds is not None and bounds.high < 0
    if verdict["better"] and not verdict["confirmed"]:
        sure = "" if verdict["interval"] else " (the rows are too few for an interval)"
        record["warnings"].append(
            f"NOT CONFIRMED: the gain over {verdict['best_static']} may be chance: "
            f"{gain_in_words(verdict)}{sure}"
        )


def paired_interval(
    split: Split, ours: Sequence[Metric], theirs: Sequence[Metric]
) -> Interval | None:
    """The interval of the difference of two models' scores, over the same rows.

    Rows are drawn anew within each task, the same ones for both models.

    Returns:
        None where a task has a single row, or models were scored on different numbers of rows.
    """
    if len(ours) != len(split.weighted) or len(theirs) != len(split.weighted):
        return None
    total = math.fsum(goal.weight for goal in split.weighted)
    draws: Any = 0.0
    for goal, a, b in zip(split.weighted, ours, theirs, strict=True):
        if not len(a.parts) == len(b.parts) > 1:
            return None
        weight = sign_of(goal, a.better) * goal.weight / total
        draws = draws + weight * (resampled(a, goal.task) - resampled(b, goal.task))
    bounds = interval(draws)
    return bounds if math.isfinite(bounds.low) and math.isfinite(bounds.high) else None


def gate(record: Mapping[str, Any], required: bool, where: Path) -> None:
    """Raise where improvement is required and there is none.

    Raises:
        GateError: no better than base, sources, soup and task arithmetic; or a broken constraint.
    """
    verdict = record["verdict"]
    keeps_constraints = not (record["best"]["violation"] or record["best"]["reported_violation"])
    if not required or (verdict is not None and verdict["better"] and keeps_constraints):
        return
    message = "improvement is required, and " + (
        f"{verdict['best_static']} scores {shown(record, verdict['best_static_score'])} without a "
        f"search, the result {shown(record, verdict['score'])}"
        if verdict is not None and keeps_constraints
        else "the result breaks a constraint"
    )
    hint = "Search longer or wider, or run without --require-improvement."
    raise GateError(message, where=str(where), hint=hint)


def score_text(split: Split, candidate: Candidate | None) -> str:
    """`best 2.6512` for a progress line."""
    if candidate is None or candidate.score is None:
        return ""
    broken = " (breaks a constraint)" if candidate.score.violation else ""
    about = {"maximised": split.is_maximised(candidate.outcome.values)}
    return f"best {shown(about, candidate.score.total, '.5g')}{broken}"
