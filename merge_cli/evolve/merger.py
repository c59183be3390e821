"""The engine for one method and one set of sources, into memory; its threads wait between."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from merge_cli.checkpoint.header import DTYPES
from merge_cli.engine.compute import MergeExecutor
from merge_cli.engine.device import Device
from merge_cli.engine.memory import worker_memory
from merge_cli.engine.operands import BlockReader, TensorReader
from merge_cli.engine.options import MergeOptions
from merge_cli.engine.pieces import output_slices
from merge_cli.engine.plan import Plan, TensorTask, is_stored_as
from merge_cli.engine.pool import Pool
from merge_cli.engine.units import Chunk, cut_chunks
from merge_cli.engine.workers import arithmetic_for, memory_errors, one_torch_thread, worker_factory
from merge_cli.errors import RecipeError
from merge_cli.evolve.resident import InMemoryFiles, Residency, in_memory_workers
from merge_cli.methods.resolve import Resolver
from merge_cli.recipe.schema import Recipe

_REMEMBERED = 4  # answers of a method's `prepare` for each tensor
Prepared = OrderedDict[str, Any]
Take = Callable[[TensorTask, Any], None]


class _Remembering(MergeExecutor):
    """A Computer whose `prepare` answers from memory where it was asked the same before."""

    remembered: dict[str, Prepared]

    def prepare(self, reader: TensorReader, task: TensorTask) -> Any:
        uses = self._method.prepare_uses
        if uses is None or self._survey is not None:
            return super().prepare(reader, task)
        key = repr([(name, task.parameters[name]) for name in uses])
        known = self.remembered.setdefault(task.name, OrderedDict())
        if key not in known:
            known[key] = super().prepare(reader, task)
            if len(known) > _REMEMBERED:
                known.popitem(last=False)
        return known[key]


@dataclass(frozen=True)
class _MergeJob:
    task: TensorTask
    units: tuple[Chunk, ...]


class InMemoryMerger:
    """The engine for one method and one set of sources, its threads kept between candidates."""

    def __init__(
        self,
        plan: Plan,
        files: InMemoryFiles,
        device: Device,
        options: MergeOptions,
        residency: Residency,
    ) -> None:
        self._plan, self._files, self._device, self._options = plan, files, device, options
        labels = [source.label for source in plan.sources]
        pieces = output_slices(plan.recipe, plan.method, labels)
        self._keys = [operand.spec.key for operand in pieces[0].operands]
        self._specs = [operand.spec for operand in pieces[0].operands]
        units: dict[int, list[Chunk]] = {}
        for unit in cut_chunks(plan.tasks):
            units.setdefault(unit.task, []).append(unit)
        self._units = units
        self._order = sorted(units, key=lambda task: (-plan.tasks[task].bytes_read, task))
        self._places = {task.name: (Path(task.name), 0) for task in plan.tasks}
        self._remembered: dict[str, Prepared] = {}
        self.surveys = False
        self._arithmetic, _ = arithmetic_for(plan, device)
        room = worker_memory(plan, device, options)
        lanes = (
            in_memory_workers(files, device, room.block)
            if residency == "device"
            else worker_factory(files, device, self._arithmetic, room)
        )
        self._pool = Pool(lanes, room.lanes)
        self._reading = BlockReader(
            self._pool, files, plan.recipe.seed, "deltas" in plan.method.supplied
        )
        self._pool.__enter__()

    def resolved(self, recipe: Recipe) -> list[TensorTask]:
        """The plan's tasks with another recipe's parameters."""
        own = {spec.key: spec for spec in recipe.models}
        specs = [own.get(k, s) for k, s in zip(self._keys, self._specs, strict=True)]
        resolver = Resolver(recipe, self._plan.method, None, specs)
        tasks = []
        for task in self._plan.tasks:
            if task.action == "copy" and not task.parameters:  # copied, whatever the method
                tasks.append(task)
                continue
            found = resolver.of(task.formula_name, task.position)
            if found.error:
                raise RecipeError([recipe.problem("merge_method", found.error)])
            copies = found.copies and is_stored_as(task.operands[0], task.dtype)
            tasks.append(
                replace(task, parameters=found.parameters, action="copy" if copies else "merge")
            )
        return tasks

    def merge(self, tasks: Sequence[TensorTask], changed: Sequence[int], take: Any) -> None:
        """Merge some of the tasks; `take(task, bytes)` gets each result."""
        computer = _Remembering(
            replace(self._plan, tasks=tuple(tasks)),
            self._reading,
            self._places,
            statistics=False,
            allow_non_finite=self._options.allow_non_finite,
        )
        computer.remembered = self._remembered

        def survey(_: None) -> None:
            computer.survey(lambda: None)

        def work(job: _MergeJob) -> None:
            if not job.task.size:
                return
            path, _ = self._places[job.task.name]
            raw = self._files.buffer(job.task.size * DTYPES[job.task.dtype][0])
            self._files.outputs[path] = raw
            try:
                computer.merge(job.task, job.units, lambda unit, stats: None)
            finally:
                del self._files.outputs[path]
            take(job.task, raw)

        wanted = set(changed)
        jobs = [_MergeJob(tasks[n], tuple(self._units[n])) for n in self._order if n in wanted]
        with one_torch_thread(self._device, self._arithmetic), memory_errors(resumes=False):
            if jobs and self._plan.method.survey is not None:
                self._pool.map(survey, [None])
                self.surveys = computer.surveyed
            self._pool.map(work, jobs)
        if self._device.kind == "cuda":
            import torch

            torch.cuda.synchronize()

    def close(self) -> None:
        self._pool.__exit__(None, None, None)
