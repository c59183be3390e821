"""What evaluators are asked and what they answer; both can be sent to other processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from merge_cli.evaluation.result import Metric, TaskResult
from merge_cli.evolve.objectives import SearchObjective, Split, SplitName, Value, Values
from merge_cli.options import MergeOptions
from merge_cli.recipe.schema import Recipe


@dataclass(frozen=True)
class Setup:
    """What a worker needs; it can be sent to another process."""

    static: Recipe
    objective: SearchObjective
    options: MergeOptions
    workers: int = 1


@dataclass(frozen=True)
class EvaluationJob:
    """One evaluation.

    Attributes:
        share: of each task's rows.
        keep_examples: whether the outcome has the goals' metrics with every example's part.
    """

    number: int
    recipe: Recipe
    split: SplitName = "search"
    share: float = 1.0
    keep_examples: bool = False

    def __str__(self) -> str:
        return f"candidate {self.number}"


@dataclass(frozen=True)
class EvaluationOutcome:
    """The result of a job; `error` is empty unless it failed.

    Attributes:
        metrics: of the split's goals with a weight, if the job keeps examples.
    """

    number: int
    values: Values = field(default_factory=dict)
    error: str = ""
    seconds: float = 0.0
    tokens: int = 0
    passes: int = 0
    metrics: tuple[Metric, ...] = ()

    def to_json(self) -> dict[str, Any]:
        values = {
            task: {name: [value.value, value.better] for name, value in metrics.items()}
            for task, metrics in self.values.items()
        }
        return {
            "values": values,
            "error": self.error,
            "seconds": self.seconds,
            "tokens": self.tokens,
            "passes": self.passes,
            **(
                {"metrics": [_metric_json(metric) for metric in self.metrics]}
                if self.metrics
                else {}
            ),
        }

    @classmethod
    def from_json(cls, number: int, data: dict[str, Any]) -> EvaluationOutcome:
        values = {
            task: {name: Value(*pair) for name, pair in metrics.items()}
            for task, metrics in data["values"].items()
        }
        metrics = tuple(Metric(**metric) for metric in data.get("metrics", ()))
        return cls(
            number,
            values,
            data["error"],
            data["seconds"],
            data["tokens"],
            data["passes"],
            metrics,
        )


def _metric_json(metric: Metric) -> dict[str, Any]:
    parts = {"parts": list(metric.parts), "weights": list(metric.weights)}
    return {**{f.name: getattr(metric, f.name) for f in fields(Metric)}, **parts}


def goal_metrics(split: Split, results: Mapping[str, TaskResult]) -> tuple[Metric, ...]:
    """The metric of each goal with a weight."""
    return tuple(
        results[goal.task].metrics[goal.metric] if goal.metric else results[goal.task].primary
        for goal in split.weighted
    )


def values_of(results: dict[str, TaskResult]) -> Values:
    """The metrics of every task."""
    return {
        name: {
            metric.name: Value(metric.value, metric.better) for metric in result.metrics.values()
        }
        for name, result in results.items()
    }
