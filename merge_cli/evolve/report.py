"""The record of a search: what the report shows, and whether it was worth it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from merge_cli.engine.memory import peak_rss
from merge_cli.errors import GateError
from merge_cli.evolve.importance import importance
from merge_cli.evolve.loop import Candidate, best_first
from merge_cli.evolve.objectives import Split, Values
from merge_cli.evolve.plan import SearchPlan
from merge_cli.evolve.space import plain_values

FOUND = "found"


def history(candidates: Sequence[Candidate]) -> list[dict[str, Any]]:
    """One entry for each candidate: its score, and the best one so far."""
    best: Candidate | None = None
    found = []
    for one in candidates:
        if one.score is not None and (best is None or one.rank_key < best.rank_key):
            best = one
        found.append(
            {
                "number": one.number,
                "generation": one.generation,
                "score": one.score.total if one.score else None,
                "parts": list(one.score.parts) if one.score else None,
                "violation": one.score.violation if one.score else None,
                "best": best.score.total if best and best.score else None,
                "share": one.share,
                "error": one.outcome.error,
            }
        )
    return found


def front(candidates: Sequence[Candidate]) -> list[int]:
    """Numbers of the candidates that none is better than in every goal."""
    known = [c for c in candidates if c.score is not None and not c.score.violation]
    found = []
    for one in known:
        assert one.score is not None
        mine = one.score.parts
        if not any(
            c.score is not None
            and c.score.parts != mine
            and all(a <= b for a, b in zip(c.score.parts, mine, strict=True))
            for c in known
        ):
            found.append(one.number)
    return found


def build_record(
    decided: SearchPlan,
    candidates: Sequence[Candidate],
    best: Candidate,
    ended: str,
    compared: Mapping[str, Values],
    references: Mapping[str, Values],
    base: Values | None,
    cost: Mapping[str, Any],
) -> dict[str, Any]:
    """JSON-ready; docs/evolve.md says what each part is.

    Args:
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
    values: Mapping[str, Any] = (
        plain_values(space, best.genome)
        if space
        else {name: bool(u) for name, u in zip(decided.labels, best.genome, strict=True)}
    )
    assert best.score is not None
    warnings = list(decided.warnings)
    found = verdict(scores, references)
    if best.score.violation:
        warnings.append(
            "NO CANDIDATE keeps the constraints; the one that breaks them least is taken"
        )
    reported = split.score(compared[FOUND], base).violation if FOUND in compared else 0.0
    if reported and split.name != "search":
        warnings.append(f"BREAKS A CONSTRAINT on the split {split.name}")
    if found is not None and not found["better"]:
        warnings.append(
            f"NO IMPROVEMENT: {split.name} score {found['score']:.4g}, and {found['best_static']} "
            f"{found['best_static_score']:.4g} without a search"
        )
    return {
        "method": decided.recipe.merge_method,
        "searched": list(decided.search.method) or ["soup"],
        "optimizer": decided.search.optimizer if space else "greedy",
        "ended": ended,
        "goals": [goal.task for goal in decided.objective.search.weighted],
        "genes": genes,
        "importance": dict(zip(genes, shares, strict=True)) if space else {},
        "history": history(candidates),
        "front": front(candidates),
        "best": {
            "number": best.number,
            "score": best.score.total,
            "violation": best.score.violation,
            "reported_violation": reported,
            "values": values,
        },
        "split": split.name,
        "scores": scores,
        "verdict": found,
        "warnings": warnings,
        "cost": {**cost, "peak_rss": peak_rss()},
    }


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
    name = min(static, key=lambda one: static[one])
    score = scores[FOUND]["score"]
    return {
        "score": score,
        "best_static": name,
        "best_static_score": static[name],
        "better": score < static[name],
    }


def gate(record: Mapping[str, Any], required: bool, where: Path) -> None:
    """Raise where improvement is required and there is none.

    Raises:
        GateError: no better than base, sources, soup and task arithmetic; or a broken constraint.
    """
    found = record["verdict"]
    kept = not (record["best"]["violation"] or record["best"]["reported_violation"])
    if not required or (found is not None and found["better"] and kept):
        return
    what = "improvement is required, and " + (
        f"{found['best_static']} scores {found['best_static_score']:.4g} without a search, the "
        f"result {found['score']:.4g}"
        if found is not None and kept
        else "the result breaks a constraint"
    )
    hint = "Search longer or wider, or run without --require-improvement."
    raise GateError(what, where=str(where), hint=hint)


def score_text(split: Split, candidate: Candidate | None) -> str:
    """`best 2.6512` for a progress line."""
    if candidate is None or candidate.score is None:
        return ""
    broken = " (breaks a constraint)" if candidate.score.violation else ""
    return f"best {candidate.score.total:.5g}{broken}"
