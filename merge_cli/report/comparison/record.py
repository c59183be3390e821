"""comparison.json: everything that the table and the page show (docs/compare.md).

The page, the table and the terminal are drawn from this record alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any

from merge_cli.comparison.result import Comparison, ModelEntry, ModelScore

SCHEMA = 1


def comparison_record(found: Comparison) -> dict[str, Any]:
    """A comparison as JSON-ready data."""
    first = found.entrants[0].evaluation
    return {
        "schema": SCHEMA,
        "merge_cli": version("merge-cli"),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": first.device,
        "dtype": first.dtype,
        "tasks": [
            {
                "name": name,
                "kind": task.kind,
                "metric": task.primary.name,
                "unit": task.primary.unit,
                "better": task.primary.better,
                "examples": len(task.primary.parts),
                "expert": found.experts.get(name),
                "normalised": name in found.shared,
            }
            for name, task in first.tasks.items()
        ],
        "ranking": {
            "by": "normalised mean" if found.quality else "mean" if found.averages else "task",
            "better": found.ranking_better,
        },
        "reference": found.reference.name if found.reference else None,
        "front": list(found.front),
        "same": dict(found.same),
        "notes": list(found.notes),
        "models": [_model(found, one) for one in found.entrants],
    }


def _model(found: Comparison, one: ModelEntry) -> dict[str, Any]:
    name = one.name
    return {
        "name": name,
        "role": one.role,
        "method": one.method,
        "place": one.place,
        "digest": one.evaluation.digest,
        "scores": {task: _score(found.scores[name, task]) for task in found.tasks},
        "normalised": {task: _score(found.normalised[name, task]) for task in found.shared},
        "mean": _score(found.averages.get(name)),
        "normalised_mean": _score(found.quality.get(name)),
        "gain": _score(found.gain(name)),
        "metrics": {
            task.name: {metric.name: metric.value for metric in task.metrics.values()}
            for task in one.evaluation.tasks.values()
        },
        "cost": asdict(one.cost) if one.cost else None,
        "evaluation_cost": asdict(one.evaluation.cost),
        "recipe": one.recipe,
    }


def _score(score: ModelScore | None) -> Mapping[str, Any] | None:
    if score is None:
        return None
    ends = score.interval
    return {"value": score.value, "interval": [ends.low, ends.high] if ends else None}
