"""A worker's inside: a live model that becomes candidates, and the tasks that score them."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace
from typing import Any

from merge_cli.engine.options import MergeOptions
from merge_cli.errors import NonFiniteError, SourceError
from merge_cli.evaluation.result import Cost, TaskResult
from merge_cli.evaluation.rows import read_rows
from merge_cli.evaluation.run import score_task
from merge_cli.evaluation.task import DataTask, Task
from merge_cli.evolve.candidate import MergeableModel
from merge_cli.evolve.objectives import SearchObjective, Split, SplitName, Value, Values, pick
from merge_cli.machine import torch_threads
from merge_cli.recipe.schema import Recipe


@dataclass(frozen=True)
class Setup:
    """What a worker is made from; it can be sent to another process."""

    static: Recipe
    objective: SearchObjective
    options: MergeOptions
    workers: int = 1


@dataclass(frozen=True)
class EvaluationJob:
    """One evaluation.

    Attributes:
        share: of each task's rows.
    """

    number: int
    recipe: Recipe
    split: SplitName = "search"
    share: float = 1.0


@dataclass(frozen=True)
class EvaluationOutcome:
    """What came of a job; `error` is empty unless it failed."""

    number: int
    values: Values = field(default_factory=dict)
    error: str = ""
    seconds: float = 0.0
    tokens: int = 0
    passes: int = 0

    def to_json(self) -> dict[str, Any]:
        values = {
            task: {name: [one.value, one.better] for name, one in metrics.items()}
            for task, metrics in self.values.items()
        }
        return {
            "values": values,
            "error": self.error,
            "seconds": self.seconds,
            "tokens": self.tokens,
            "passes": self.passes,
        }

    @classmethod
    def from_json(cls, number: int, data: dict[str, Any]) -> EvaluationOutcome:
        values = {
            task: {name: Value(*pair) for name, pair in metrics.items()}
            for task, metrics in data["values"].items()
        }
        return cls(number, values, data["error"], data["seconds"], data["tokens"], data["passes"])


def values_of(results: dict[str, TaskResult]) -> Values:
    """Every task's metrics."""
    return {
        name: {metric.name: Value(metric.value, metric.better) for metric in one.metrics.values()}
        for name, one in results.items()
    }


class Evaluator:
    """Loads what the setup says once, then answers jobs one after the other."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._data = {
            str(task.data)
            for split in setup.objective.splits.values()
            for task in split.spec.tasks
            if isinstance(task, DataTask)
        }
        spec = setup.objective.search.spec
        self._merge = MergeableModel(
            setup.static,
            setup.options,
            workers=setup.workers,
            device=spec.device,
            dtype=spec.dtype,
            max_length=spec.max_length,
            batch_tokens=spec.batch_tokens,
            seed=spec.seed,
        )
        self._merge.live.teachers = {}

    @property
    def merge(self) -> MergeableModel:
        """The live model and what it has done."""
        return self._merge

    def answer(self, job: EvaluationJob) -> EvaluationOutcome:
        """Score a candidate. What goes wrong with it is part of the outcome.

        Raises:
            SourceError: data that no candidate can be scored on.
        """
        started = time.monotonic()
        live = self._merge.live
        cost = Cost()
        results: dict[str, TaskResult] = {}
        error = ""
        try:
            self._merge.become(job.recipe)
            spec = self._setup.objective.splits[job.split].spec
            with torch_threads(spec.threads):
                for task in spec.tasks:
                    found = score_task(reduced(task, job.share), live)
                    results[task.name] = found
                    cost = _sum(cost, found.cost)
            _need_numbers(self._setup.objective.splits[job.split], results)
        except SourceError as failure:
            if failure.file in self._data:
                raise
            error, results = _said(failure), {}
            cost = _sum(cost, live.cost)
        except Exception as failure:  # any candidate may fail in any way: the search goes on
            error, results = _said(failure), {}
            cost = _sum(cost, live.cost)
        seconds = round(time.monotonic() - started, 4)
        values = values_of(results)
        return EvaluationOutcome(
            job.number, values, error, seconds, cost.tokens, cost.forward_passes
        )

    def close(self) -> None:
        """Let go of everything."""
        self._merge.close()


def _need_numbers(split: Split, results: dict[str, TaskResult]) -> None:
    """Refuse a value that counts and is no number: an optimizer cannot tell where to go from it.

    Raises:
        NonFiniteError: there is one.
    """
    values = values_of(results)
    for goal in split.goals:
        if not math.isfinite(pick(values, goal).value):
            raise NonFiniteError(f"{goal.task}.{goal.metric or 'its metric'} is not a number")


def _said(failure: Exception) -> str:
    return f"{type(failure).__name__}: {str(failure).strip() or 'without a message'}"


def reduced(task: Task, share: float) -> Task:
    """The task on a share of its rows, at least one."""
    if share >= 1.0 or not isinstance(task, DataTask):
        return task
    rows = len(read_rows(task.data))
    whole = rows if task.limit is None else min(rows, task.limit)
    return replace(task, limit=max(1, math.ceil(share * whole)))


def _sum(a: Cost, b: Cost) -> Cost:
    return Cost(a.seconds + b.seconds, a.tokens + b.tokens, a.forward_passes + b.forward_passes)
