"""Evaluating candidates: the loaded model becomes each of them, and its scores are the answer."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

from merge_cli.calibration.run import calibrate
from merge_cli.errors import NonFiniteError, SourceError
from merge_cli.evaluation.live import LiveModel
from merge_cli.evaluation.result import Cost, Metric, TaskResult
from merge_cli.evaluation.rows import read_rows
from merge_cli.evaluation.run import score_task
from merge_cli.evaluation.task import DataTask, Task
from merge_cli.evolve.jobs import EvaluationJob, EvaluationOutcome, Setup, goal_metrics, values_of
from merge_cli.evolve.mergeable import MergeableModel
from merge_cli.evolve.objectives import Split, pick
from merge_cli.methods.registry import get_method
from merge_cli.planning.plan import Plan
from merge_cli.planning.planner import make_plan
from merge_cli.recipe.schema import Recipe
from merge_cli.system.machine import torch_threads


class Evaluator:
    """Loads the model once, then evaluates jobs one after the other."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._data = {
            str(task.data)
            for split in setup.objective.splits.values()
            for task in split.spec.tasks
            if isinstance(task, DataTask)
        }
        spec = setup.objective.search.spec
        self._how: dict[str, Any] = {
            "workers": setup.workers,
            "device": spec.device,
            "dtype": spec.dtype,
            "max_length": spec.max_length,
            "batch_tokens": spec.batch_tokens,
            "seed": spec.seed,
        }
        self._merge = MergeableModel(setup.static, setup.options, **self._how)
        self._stack: MergeableModel | None = None  # the last candidate that is not as deep
        self._merge.live.teachers = {}

    @property
    def merge(self) -> MergeableModel:
        """The model that becomes candidates."""
        return self._merge

    def answer(self, job: EvaluationJob) -> EvaluationOutcome:
        """Score a candidate; its errors are part of the outcome.

        Raises:
            SourceError: data that cannot be used for any candidate.
        """
        started = time.monotonic()
        live = self._merge.live
        cost = Cost()
        results: dict[str, TaskResult] = {}
        message = ""
        try:
            if job.recipe.slices:
                live = self._stacked(job.recipe)
            else:
                self._merge.become(job.recipe, self._calibrated(job.recipe))
            spec = self._setup.objective.splits[job.split].spec
            with torch_threads(spec.threads):
                for task in spec.tasks:
                    result = score_task(reduced(task, job.share), live)
                    results[task.name] = result
                    cost = _sum(cost, result.cost)
            _require_finite(self._setup.objective.splits[job.split], results)
        except SourceError as failure:
            if failure.file in self._data:
                raise
            message, results = _message(failure), {}
            cost = _sum(cost, live.cost)
        except Exception as failure:  # any candidate may fail: the search goes on
            message, results = _message(failure), {}
            cost = _sum(cost, live.cost)
        seconds = round(time.monotonic() - started, 4)
        values = values_of(results)
        metrics: tuple[Metric, ...] = ()
        if job.keep_examples and not message:
            metrics = goal_metrics(self._setup.objective.splits[job.split], results)
        return EvaluationOutcome(
            job.number, values, message, seconds, cost.tokens, cost.forward_passes, metrics
        )

    def _stacked(self, recipe: Recipe) -> LiveModel:
        """A model of another depth: built anew, from the same bytes in memory."""
        if self._stack is not None:
            self._stack.close()
        self._stack = MergeableModel(recipe, self._setup.options, shared=self._merge, **self._how)
        self._stack.live.teachers = self._merge.live.teachers
        self._stack.become(recipe)
        return self._stack.live

    def _calibrated(self, recipe: Recipe) -> Plan | None:
        """The plan with its statistics, where the method needs them; from the cache, if there."""
        if not get_method(recipe.merge_method).gathers:
            return None
        return calibrate(make_plan(recipe), self._setup.options, lambda progress: None)

    def close(self) -> None:
        """Free the models and the sources."""
        if self._stack is not None:
            self._stack.close()
        self._merge.close()


def _require_finite(split: Split, results: dict[str, TaskResult]) -> None:
    """Refuse goals whose value is not finite: optimizers cannot use them.

    Raises:
        NonFiniteError: a value is not finite.
    """
    values = values_of(results)
    for goal in split.goals:
        if not math.isfinite(pick(values, goal).value):
            raise NonFiniteError(f"{goal.task}.{goal.metric or 'its metric'} is not a number")


def _message(failure: Exception) -> str:
    return f"{type(failure).__name__}: {str(failure).strip() or 'without a message'}"


def reduced(task: Task, share: float) -> Task:
    """The task with a share of its rows, at least one."""
    if share >= 1.0 or not isinstance(task, DataTask):
        return task
    rows = len(read_rows(task.data))
    available = rows if task.limit is None else min(rows, task.limit)
    return replace(task, limit=max(1, math.ceil(share * available)))


def _sum(a: Cost, b: Cost) -> Cost:
    return Cost(a.seconds + b.seconds, a.tokens + b.tokens, a.forward_passes + b.forward_passes)
