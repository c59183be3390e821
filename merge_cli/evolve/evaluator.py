"""Evaluating candidates: one loaded model that becomes any merge of the sources, and its scores.

The model is loaded by the same code as a merged model on disk, from a folder of links with the
output's config and tokenizer, so that both behave the same, generation settings included.

Merges run in the engine, from memory to memory. Tensors that have not changed since the last
candidate stay, and what a method has measured of a complete tensor (thresholds, norms) is kept for
the same parameters.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from merge_cli.calibration.run import calibrate
from merge_cli.checkpoint.dtypes import torch_dtype
from merge_cli.engine.device import choose_device
from merge_cli.engine.in_memory import (
    InMemoryFiles,
    InMemoryMerger,
)
from merge_cli.engine.parameter_slices import find_parameter_slices
from merge_cli.engine.residency import SourceResidency, choose_residency, stored_bytes
from merge_cli.errors import NonFiniteError, SourceError
from merge_cli.evaluation.live import LiveModel, load
from merge_cli.evaluation.result import Cost, Metric, TaskResult
from merge_cli.evaluation.rows import read_rows
from merge_cli.evaluation.run import score_task
from merge_cli.evaluation.task import DataTask, Task
from merge_cli.evolve.objectives import SearchObjective, Split, SplitName, Value, Values, pick
from merge_cli.methods.registry import get_method
from merge_cli.options import MergeOptions
from merge_cli.planning.auxiliary import write_auxiliary_files
from merge_cli.planning.plan import Plan, TensorTask
from merge_cli.planning.planner import make_plan
from merge_cli.planning.tasks import TaskResolver
from merge_cli.recipe.reference import ModelRef
from merge_cli.recipe.schema import Recipe
from merge_cli.sources.source import open_source
from merge_cli.sources.storage import INDEX
from merge_cli.system.machine import torch_threads

# Mergers that are kept with their threads: one for each method and set of sources.
_MERGERS = 4


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
        self._stack = MergeableModel(recipe, self._setup.options, beside=self._merge, **self._how)
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


def load_scaffold(plan: Plan, options: MergeOptions, **loading: Any) -> LiveModel:
    """A model with the plan's config and tokenizer, and weights that will be replaced.

    Args:
        loading: as for `evaluation.live.load`.

    Raises:
        SourceError: transformers cannot load it.
        ResourceError: there is no such device, or the model does not fit into its memory.
    """
    config_source = plan.sources[plan.config_index]
    with TemporaryDirectory(prefix="merge-cli-live-") as name:
        folder = Path(name)
        write_auxiliary_files(
            plan, folder, tokenizer=options.copy_tokenizer, code=options.trust_remote_code
        )
        if not plan.config:
            (folder / "config.json").symlink_to((config_source.root / "config.json").resolve())
        (folder / INDEX).unlink(missing_ok=True)
        for file in config_source.root.iterdir():
            if file.suffix == ".safetensors" or file.name == INDEX:
                (folder / file.name).symlink_to(file.resolve())
        live = load(open_source(ModelRef(str(folder)), folder), incomplete=True, **loading)
    live.label = "candidate"
    return live


class MergeableModel:
    """A loaded model whose weights become those of any merge of the sources.

    Args:
        recipe: one static recipe of the sources; others may differ in method, in parameters, and
            in which of the sources they list.
        beside: another one, whose bytes of the sources are used; it is closed later.
        loading: of the model: device, dtype, max_length, batch_tokens, seed, memory.

    Attributes:
        live: the model, with the weights of the last recipe's merge.
        rewritten, skipped: how many tensors candidates have changed, and left unchanged.
    """

    def __init__(
        self,
        recipe: Recipe,
        options: MergeOptions,
        *,
        workers: int = 1,
        beside: MergeableModel | None = None,
        **loading: Any,
    ) -> None:
        plan = make_plan(recipe)
        self._options, self._device = options, choose_device(options.device)
        refs = list(plan.stored_inputs)
        index = self._device.indexes[0] if self._device.indexes else None
        self.residency: SourceResidency = choose_residency(
            stored_bytes(refs), index, on_device=plan.bytes_written, workers=workers
        )
        where = "cpu" if index is None else f"cuda:{index}"
        self._beside = beside
        if beside is not None:
            self.residency = beside.residency
        self._files: InMemoryFiles = (
            beside._files if beside is not None else InMemoryFiles(self.residency, where)
        )
        self._files.keep(refs)
        self.live: LiveModel = load_scaffold(plan, options, **loading)
        self._parameters = find_parameter_slices(plan, self.live.net)
        self._mergers: OrderedDict[tuple[Any, ...], tuple[TaskResolver, InMemoryMerger]] = (
            OrderedDict()
        )
        self._merged_with: dict[str, str] = {}  # tensor -> key of the merge whose weights it has
        self.rewritten = self.skipped = 0

    def become(self, recipe: Recipe, plan: Plan | None = None) -> None:
        """Change the model's parameters to the weights that merging the recipe would write.

        Args:
            plan: the recipe's, where more than headers went into it: statistics of examples.

        Raises:
            RecipeError: parameters that the method does not allow.
            NonFiniteError: as for a merge.
            ResourceError: memory ran out.
        """
        models = tuple((spec.model, spec.layer_range) for spec in recipe.source_specs)
        key = (recipe.merge_method, recipe.coefficients, *models)
        if key not in self._mergers:
            plan = plan or make_plan(recipe)
            self._files.keep(plan.stored_inputs)
            self._mergers[key] = (
                TaskResolver(plan),
                InMemoryMerger(
                    plan, self._files, self._device, self._options, self.residency.residency
                ),
            )
            if len(self._mergers) > _MERGERS:
                self._mergers.popitem(last=False)[1][1].close()
        self._mergers.move_to_end(key)
        resolver, merger = self._mergers[key]
        tasks = resolver.tasks(recipe)
        keys = {
            task.name: f"{key} {task.action} {sorted(task.parameters.items())}"
            for task in tasks
            if task.name in self._parameters
        }
        changed = [
            number
            for number, task in enumerate(tasks)
            if task.name in self._parameters
            and (merger.has_model_pass or self._merged_with.get(task.name) != keys[task.name])
        ]
        for number in changed:
            self._merged_with.pop(
                tasks[number].name, None
            )  # neither the old nor the new merge until it is complete
        merger.merge(tasks, changed, self._take)
        for number in changed:
            self._merged_with[tasks[number].name] = keys[tasks[number].name]
        self.rewritten += len(changed)
        self.skipped += len(keys) - len(changed)

    def close(self) -> None:
        """Let go of the model, the sources and the threads."""
        for _, merger in self._mergers.values():
            merger.close()
        self.live.close()
        if self._beside is None:
            self._files.close()

    def _take(self, task: TensorTask, raw: Any) -> None:
        """Copy a merged tensor into its parameter; called by the pool's threads."""
        import torch

        tensor = raw if isinstance(raw, torch.Tensor) else torch.from_numpy(raw)
        stored = tensor.view(torch_dtype(task.dtype))
        with torch.no_grad():
            self._parameters[task.name].values.copy_(stored.reshape(task.shape))
