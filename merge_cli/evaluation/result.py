"""The result of an evaluation: for every metric a part and a weight of each example.

A value is the sum of the parts over the sum of the weights. A loss has an example's nats and its
tokens, an accuracy 1 or 0 and 1. Keeping the examples apart is what makes standard errors and
paired intervals possible (`summary.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any, Literal

Better = Literal["lower", "higher"]


@dataclass(frozen=True)
class Metric:
    """One number, with the parts that make it.

    Attributes:
        unit: what one weight counts: "nats per token", "of examples".
        better: the direction of improvement.
        parts, weights: one for each example; the weights are not negative.
        power: the value is e to the ratio: a perplexity.
    """

    name: str
    unit: str
    better: Better
    parts: Sequence[float]
    weights: Sequence[float]
    power: bool = False

    @property
    def ratio(self) -> float:
        """Sum of parts over sum of weights."""
        return math.fsum(self.parts) / math.fsum(self.weights)

    @property
    def value(self) -> float:
        """The ratio, or e to it; infinite where that is larger than any number."""
        try:
            return math.exp(self.ratio) if self.power else self.ratio
        except OverflowError:
            return math.inf

    def worse(self, than: float) -> bool:
        """Whether this value is worse than another; NaN always is."""
        within = self.value <= than if self.better == "lower" else self.value >= than
        return not within


@dataclass(frozen=True)
class Cost:
    """The cost of scoring. `tokens` went through the model, without padding."""

    seconds: float = 0.0
    tokens: int = 0
    forward_passes: int = 0


@dataclass(frozen=True)
class TaskResult:
    """One task's outcome for one model.

    Attributes:
        metrics: by name; the first is the task's primary one.
        examples: one JSON-ready dict for each, with what was measured and, if generated, the text.
        cached: whether it comes from the cache.
        notes: for readers of the numbers, such as that prompts were cut.
    """

    name: str
    kind: str
    metrics: Mapping[str, Metric]
    examples: Sequence[Mapping[str, Any]] = field(repr=False)
    cost: Cost = Cost()
    cached: bool = False
    notes: tuple[str, ...] = ()

    @property
    def primary(self) -> Metric:
        """The metric that stands for the task in a comparison."""
        return next(iter(self.metrics.values()))

    @property
    def value(self) -> float:
        """The primary metric's value."""
        return self.primary.value

    def __getitem__(self, metric: str) -> Metric:
        return self.metrics[metric]


@dataclass(frozen=True)
class Evaluation:
    """One model on every task.

    Attributes:
        model: as the user named it.
        digest: SHA-256 of the model's files (config, weights, tokenizer).
        device, dtype: of the computation, each with the reason.
    """

    model: str
    digest: str
    device: str
    dtype: str
    tasks: Mapping[str, TaskResult]

    def __getitem__(self, task: str) -> TaskResult:
        return self.tasks[task]

    def _repr_html_(self) -> str:
        """A table in a notebook: each task's metrics, with their units."""
        rows = [
            (name, metric.name, f"{metric.value:.4g}", metric.unit, str(len(metric.parts)))
            for name, task in self.tasks.items()
            for metric in task.metrics.values()
        ]
        cells = "".join(
            f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows
        )
        heads = "<th>task</th><th>metric</th><th>value</th><th>unit</th><th>examples</th>"
        return (
            f"<table><caption>{escape(self.model)}</caption><thead><tr>{heads}</tr></thead>"
            f"<tbody>{cells}</tbody></table>"
        )

    @property
    def cost(self) -> Cost:
        """The cost of all tasks; cached results have their original cost."""
        costs = [task.cost for task in self.tasks.values()]
        return Cost(
            sum(c.seconds for c in costs),
            sum(c.tokens for c in costs),
            sum(c.forward_passes for c in costs),
        )
