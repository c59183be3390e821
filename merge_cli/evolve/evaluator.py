"""A worker's inside: a live model that becomes candidates, and the tasks that score them.

The live model before it is anything: the output's config, tokenizer and shapes, any weights.

It is loaded by the same code as a merged model on disk, from a folder of links, so that both answer
alike down to the generation settings.

One live model that becomes the merge of any recipe of the same sources, in place.

Every weight comes from the engine's own `Computer`, over the engine's own lanes: only where it
reads from and writes to is different. What has not changed since the last candidate is left as it
is, and what a method had to know of a whole tensor (thresholds, norms) is remembered for the same
parameters.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from merge_cli.engine.device import choose_device
from merge_cli.engine.in_memory import (
    InMemoryFiles,
    InMemoryMerger,
    SourcesInMemory,
    choose_residency,
)
from merge_cli.engine.options import MergeOptions
from merge_cli.engine.parameter_slices import find_parameter_slices
from merge_cli.errors import NonFiniteError, SourceError
from merge_cli.evaluation.live import LiveModel, load
from merge_cli.evaluation.result import Cost, TaskResult
from merge_cli.evaluation.rows import read_rows
from merge_cli.evaluation.run import score_task
from merge_cli.evaluation.task import DataTask, Task
from merge_cli.evolve.objectives import SearchObjective, Split, SplitName, Value, Values, pick
from merge_cli.planning.auxiliary import write_auxiliary_files
from merge_cli.planning.plan import Plan, TensorTask
from merge_cli.planning.planner import make_plan
from merge_cli.recipe.reference import ModelRef
from merge_cli.recipe.schema import Recipe
from merge_cli.sources.source import open_source
from merge_cli.sources.storage import INDEX
from merge_cli.system.machine import torch_threads


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
            task: {name: [item.value, item.better] for name, item in metrics.items()}
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
        name: {metric.name: Value(metric.value, metric.better) for metric in item.metrics.values()}
        for name, item in results.items()
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
                    result = score_task(reduced(task, job.share), live)
                    results[task.name] = result
                    cost = _sum(cost, result.cost)
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


def load_scaffold(plan: Plan, options: MergeOptions, **loading: Any) -> LiveModel:
    """A model with the plan's config and tokenizer and its donor's weights, soon to be replaced.

    Args:
        loading: as for `evaluation.live.load`.

    Raises:
        SourceError: transformers cannot load it.
        ResourceError: the device is not there, or the model does not fit in its memory.
    """
    donor = plan.sources[plan.donor]
    with TemporaryDirectory(prefix="merge-cli-live-") as name:
        folder = Path(name)
        write_auxiliary_files(
            plan, folder, tokenizer=options.copy_tokenizer, code=options.trust_remote_code
        )
        if not plan.config:
            (folder / "config.json").symlink_to((donor.root / "config.json").resolve())
        (folder / INDEX).unlink(missing_ok=True)
        for file in donor.root.iterdir():
            if file.suffix == ".safetensors" or file.name == INDEX:
                (folder / file.name).symlink_to(file.resolve())
        live = load(open_source(ModelRef(str(folder)), folder), incomplete=True, **loading)
    live.label = "candidate"
    return live


# Methods, or sets of sources (a greedy soup tries one after another), whose threads are kept.
_ENGINES = 4
_TORCH = {
    "F64": "float64",
    "F32": "float32",
    "BF16": "bfloat16",
    "F16": "float16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


class MergeableModel:
    """A loaded model, its sources, and what turns a recipe into its weights.

    Args:
        recipe: one static recipe of the sources; others may differ in method, in parameters, and
            in which of the sources they list.
        loading: of the live model: device, dtype, max_length, batch_tokens, seed, memory.

    Attributes:
        live: the model, holding the merge of the last recipe.
        rewritten, skipped: tensors that candidates have changed, and that they left as they were.
    """

    def __init__(
        self, recipe: Recipe, options: MergeOptions, *, workers: int = 1, **loading: Any
    ) -> None:
        plan = make_plan(recipe)
        self._options, self._device = options, choose_device(options.device)
        refs = list(plan.stored_inputs)
        self.place: SourcesInMemory = choose_residency(
            refs, self._device, workers, plan.bytes_written
        )
        where = f"cuda:{self._device.indexes[0]}" if self._device.indexes else "cpu"
        self._files = InMemoryFiles(self.place, where)
        self._files.keep(refs)
        self.live: LiveModel = load_scaffold(plan, options, **loading)
        self._seats = find_parameter_slices(plan, self.live.net)
        self._mergers: OrderedDict[tuple[Any, ...], InMemoryMerger] = OrderedDict()
        self._held: dict[str, str] = {}  # tensor -> what it holds the merge of
        self.rewritten = self.skipped = 0

    def become(self, recipe: Recipe) -> None:
        """Rewrite the live model's parameters: the weights that merging the recipe would write.

        Raises:
            RecipeError: parameters that no tensor can be merged with.
            NonFiniteError: as for a merge.
            ResourceError: memory ran out.
        """
        key = (recipe.merge_method, *(spec.model for spec in recipe.models))
        if key not in self._mergers:
            plan = make_plan(recipe)
            self._files.keep(plan.stored_inputs)
            self._mergers[key] = InMemoryMerger(
                plan, self._files, self._device, self._options, self.place.residency
            )
            if len(self._mergers) > _ENGINES:
                self._mergers.popitem(last=False)[1].close()
        self._mergers.move_to_end(key)
        merger = self._mergers[key]
        tasks = merger.resolved(recipe)
        requested = {
            task.name: f"{key} {task.action} {sorted(task.parameters.items())}"
            for task in tasks
            if task.name in self._seats
        }
        changed = [
            number
            for number, task in enumerate(tasks)
            if task.name in self._seats
            and (merger.surveys or self._held.get(task.name) != requested[task.name])
        ]
        for number in changed:
            self._held.pop(tasks[number].name, None)  # half-way it holds neither
        merger.merge(tasks, changed, self._take)
        for number in changed:
            self._held[tasks[number].name] = requested[tasks[number].name]
        self.rewritten += len(changed)
        self.skipped += len(requested) - len(changed)

    def close(self) -> None:
        """Let go of the model, the sources and the threads."""
        for merger in self._mergers.values():
            merger.close()
        self.live.close()
        self._files.close()

    def _take(self, task: TensorTask, raw: Any) -> None:
        """A merged tensor's bytes into the parameter; by the pool's threads."""
        import torch

        held = raw if isinstance(raw, torch.Tensor) else torch.from_numpy(raw)
        stored = held.view(getattr(torch, _TORCH[task.dtype]))
        with torch.no_grad():
            self._seats[task.name].values.copy_(stored.reshape(task.shape))
