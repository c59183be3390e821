"""Evaluations as JSON-ready data: values, intervals, differences, costs; without the examples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from merge_cli.evaluation.intervals import difference, interval, resampled, standard_error
from merge_cli.evaluation.result import Evaluation, Metric


def summary(evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """One entry for each model; the first is the one that differences are to the others.

    Returns:
        for each model its tasks, for each task its metrics with `value`, `standard_error`,
        `interval` and, for the others, `difference` (the first minus this one) with its paired
        interval. See docs/evaluate.md.
    """
    first = evaluations[0]
    return [
        {
            "model": one.model,
            "digest": one.digest,
            "device": one.device,
            "dtype": one.dtype,
            "tasks": {
                name: {
                    "kind": task.kind,
                    "examples": len(task.examples),
                    "cached": task.cached,
                    "notes": list(task.notes),
                    "cost": asdict(task.cost),
                    "metrics": {
                        metric.name: _metric(
                            metric, name, None if one is first else first[name][metric.name]
                        )
                        for metric in task.metrics.values()
                    },
                }
                for name, task in one.tasks.items()
            },
        }
        for one in evaluations
    ]


def _metric(metric: Metric, task: str, first: Metric | None) -> dict[str, Any]:
    found: dict[str, Any] = {
        "value": _plain(metric.value),
        "unit": metric.unit,
        "better": metric.better,
        "standard_error": _plain(standard_error(metric)),
        "interval": None,
    }
    draws = resampled(metric, task) if len(metric.parts) > 1 else ()
    if len(draws) and math.isfinite(max(draws)):
        whole = interval(draws)
        found["interval"] = [whole.low, whole.high]
    if first is not None:
        found["difference"] = _plain(first.value - metric.value)
        found["difference_interval"] = None
        paired = difference(first, metric, task)
        found["difference_interval"] = [paired.low, paired.high] if paired else None
    return found


def _plain(value: float | None) -> float | None:
    """A number as JSON has it: a perplexity beyond all numbers is null."""
    return value if value is not None and math.isfinite(value) else None
