"""Evaluations as JSON-ready data: values, standard errors, bootstrap intervals, differences, costs.

Examples are drawn with replacement and every metric is computed again from the drawn ones
(Efron 1979). The draws are a function of task, number of examples and seed alone: two models on
the same task see the same draws, so that the difference of their resampled values is a paired
bootstrap by construction, and so is anything else that is computed from several of them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from merge_cli.evaluation.result import Evaluation, Metric

LEVEL = 0.95
DRAWS = 2000
_BLOCK = 2_000_000  # indices drawn at once


def summary(evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """One entry for each model; the first is compared with the others.

    Returns:
        for each model its tasks, for each task its metrics with `value`, `standard_error`,
        `interval` and, for the others, `difference` (the first minus this one) with its paired
        interval. See docs/evaluate.md.
    """
    first = evaluations[0]
    return [
        {
            "model": evaluation.model,
            "digest": evaluation.digest,
            "device": evaluation.device,
            "dtype": evaluation.dtype,
            "tasks": {
                name: {
                    "kind": task.kind,
                    "examples": len(task.examples),
                    "cached": task.cached,
                    "notes": list(task.notes),
                    "cost": asdict(task.cost),
                    "metrics": {
                        metric.name: _metric(
                            metric, name, None if evaluation is first else first[name][metric.name]
                        )
                        for metric in task.metrics.values()
                    },
                }
                for name, task in evaluation.tasks.items()
            },
        }
        for evaluation in evaluations
    ]


def _metric(metric: Metric, task: str, first: Metric | None) -> dict[str, Any]:
    data: dict[str, Any] = {
        "value": _plain(metric.value),
        "unit": metric.unit,
        "better": metric.better,
        "standard_error": _plain(standard_error(metric)),
        "interval": None,
    }
    draws = resampled(metric, task) if len(metric.parts) > 1 else ()
    if len(draws) and math.isfinite(max(draws)):
        bounds = interval(draws)
        data["interval"] = [bounds.low, bounds.high]
    if first is not None:
        data["difference"] = _plain(first.value - metric.value)
        data["difference_interval"] = None
        paired = difference(first, metric, task)
        data["difference_interval"] = [paired.low, paired.high] if paired else None
    return data


def _plain(value: float | None) -> float | None:
    """A number for JSON: an infinite perplexity is null."""
    return value if value is not None and math.isfinite(value) else None


@dataclass(frozen=True)
class Interval:
    """`low` to `high` holds the true value in `LEVEL` of all cases."""

    low: float
    high: float


def standard_error(metric: Metric) -> float | None:
    """The standard error of a ratio of sums, by the delta method; None for fewer than two examples.

    With r = Σp/Σw: se² = n/(n−1) · Σ(pᵢ − r·wᵢ)² / (Σw)² (Cochran 1977, 6.3). For an accuracy
    it is the familiar √(p(1−p)/(n−1)).
    """
    n = len(metric.parts)
    if n < 2:
        return None
    ratio, total = metric.ratio, math.fsum(metric.weights)
    squares = ((p - ratio * w) ** 2 for p, w in zip(metric.parts, metric.weights, strict=True))
    residues = math.fsum(squares)
    error = math.sqrt(n / (n - 1) * residues) / total
    return error * metric.value if metric.power else error  # the derivative of e^x is e^x


def resampled(metric: Metric, key: str, *, draws: int = DRAWS) -> Any:
    """The metric's value in each draw.

    Args:
        key: names the draws: the same key and number of examples give the same ones.

    Returns:
        float64 array [draws].
    """
    import numpy as np

    parts = np.asarray(metric.parts, dtype=np.float64)
    weights = np.asarray(metric.weights, dtype=np.float64)
    n = len(parts)
    digest = hashlib.sha256(f"{key}\0{n}".encode()).digest()
    generator = np.random.default_rng(np.frombuffer(digest, dtype=np.uint32))
    values = np.empty(draws)
    step = max(1, _BLOCK // n)
    for start in range(0, draws, step):
        drawn = generator.integers(n, size=(min(step, draws - start), n))
        weight = weights[drawn].sum(1)
        part = parts[drawn].sum(1)
        # All drawn examples without weight: as if nothing had been drawn.
        values[start : start + len(drawn)] = np.where(
            weight > 0, part / np.maximum(weight, 1e-300), metric.ratio
        )
    with np.errstate(over="ignore"):  # infinite, as the metric's own value is
        return np.exp(values) if metric.power else values


def interval(samples: Any, level: float = LEVEL) -> Interval:
    """The percentile interval of resampled values [draws]."""
    import numpy as np

    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def difference(a: Metric, b: Metric, key: str) -> Interval | None:
    """The interval of a − b over the same examples; None for a single one, or an infinite value.

    Raises:
        ValueError: the two have different numbers of examples.
    """
    if len(a.parts) != len(b.parts):
        raise ValueError(f"{len(a.parts)} examples cannot be paired with {len(b.parts)}")
    if len(a.parts) < 2:
        return None
    values_a, values_b = resampled(a, key), resampled(b, key)
    if not math.isfinite(math.fsum([*values_a, *values_b])):
        return None
    return interval(values_a - values_b)
