"""The sources' stored bytes in memory, behind the interfaces through which the engine reads files.

What the engine computes with is the same bytes that lie on disk, so that a candidate's weights are
the same bits that a merge of its recipe writes.

The engine for one method and one set of sources, into memory; its threads wait between.
"""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from merge_cli.checkpoint.headers import DTYPES, TensorRef
from merge_cli.checkpoint.tensors import Tensor
from merge_cli.engine.device import Device
from merge_cli.engine.device_worker import CudaTransfers, StagedWorker
from merge_cli.engine.executor import MergeExecutor
from merge_cli.engine.memory import worker_memory
from merge_cli.engine.operands import BlockReader, TensorReader
from merge_cli.engine.options import MergeOptions
from merge_cli.engine.pool import (
    Pool,
    arithmetic_for,
    memory_errors,
    one_torch_thread,
    worker_factory,
)
from merge_cli.engine.worker_context import Files, StageClock, WorkerContext
from merge_cli.errors import RecipeError
from merge_cli.evaluation.live import free_memory
from merge_cli.planning.output_slices import output_slices
from merge_cli.planning.plan import Chunk, Plan, TensorTask, cut_chunks, is_stored_as
from merge_cli.planning.resolve import Resolver
from merge_cli.recipe.schema import Recipe
from merge_cli.system.machine import show_size
from merge_cli.system.raw_io import FilePool, read_into

_HOST_SHARE, _DEVICE_SHARE = 0.5, 0.6  # of free memory; the live model and others take the rest
Residency = Literal["device", "host", "disk"]


@dataclass(frozen=True)
class SourcesInMemory:
    """Where the sources' bytes wait, and why there."""

    residency: Residency
    reason: str
    bytes: int


def choose_residency(
    refs: Iterable[TensorRef], device: Device, workers: int = 1, model: int = 0
) -> SourcesInMemory:
    """The device beside the live model, else host memory for all workers' copies, else the disk.

    Args:
        model: bytes of the live model.
    """
    size = sum(ref.nbytes for ref in {(r.path, r.offset): r for r in refs}.values())
    shown, small = show_size(size), ""
    if device.kind == "cuda":
        # A worker has one device; those of a pool share the first.
        room = int(free_memory("cuda", device.indexes[:1]) * _DEVICE_SHARE) // workers - model
        if size <= room:
            return SourcesInMemory("device", f"{shown} fit beside the model", size)
        small = f"{shown} do not fit beside the model; "
    room = int(free_memory("cpu", ()) * _HOST_SHARE) // workers
    if size <= room:
        return SourcesInMemory("host", f"{small}{shown} fit in memory", size)
    return SourcesInMemory("disk", f"{shown}, and room for {show_size(room)} in memory", size)


class InMemoryFiles(Files):
    """Sources from memory (or disk), outputs into buffers.

    Args:
        device: torch's word for where sources of the residency `device` wait.

    Attributes:
        outputs: for each path that is written to, uint8 (numpy; torch with the residency `device`);
            put here before, taken out after.
        on_device: stored tensors that wait there, torch uint8.
    """

    def __init__(self, place: SourcesInMemory, device: str = "cpu") -> None:
        self._disk = FilePool(os.O_RDONLY)
        super().__init__(self._disk, self._disk)
        self._place, self._device = place, device
        self._kept: dict[tuple[Path, int], memoryview] = {}
        self.on_device: dict[tuple[Path, int], Any] = {}
        self.outputs: dict[Path, Any] = {}

    def buffer(self, size: int) -> Any:
        """What an output of so many bytes is written into."""
        if self._place.residency == "device":
            import torch

            return torch.empty(size, dtype=torch.uint8, device=self._device)
        import numpy as np

        return np.empty(size, np.uint8)

    def keep(self, refs: Iterable[TensorRef]) -> None:
        """Read tensors into memory, unless the place is the disk; each once."""
        if self._place.residency == "disk":
            return
        for ref in refs:
            where = ref.path, ref.offset
            if where in self._kept or where in self.on_device:
                continue
            buffer = memoryview(bytearray(ref.nbytes))
            if ref.nbytes:
                read_into(self._disk, ref.path, ref.offset, buffer, ref.model)
            if self._place.residency == "device":
                import torch

                host = torch.frombuffer(buffer, dtype=torch.uint8) if ref.nbytes else torch.empty(0)
                self.on_device[where] = host.to(self._device, torch.uint8)
            else:
                self._kept[where] = buffer

    def ask_for(self, ref: TensorRef, start: int, size: int) -> None:
        if self._place.residency == "disk":
            super().ask_for(ref, start, size)

    def read_stored(
        self, clock: StageClock, ref: TensorRef, start: int, buffer: memoryview
    ) -> None:
        kept = self._kept.get((ref.path, ref.offset))
        if kept is None:  # on the disk; or on the device, and wanted here for once
            super().read_stored(clock, ref, start, buffer)
            return
        began = time.perf_counter()
        offset = start * DTYPES[ref.dtype][0]
        view = buffer.cast("B")
        view[:] = kept[offset : offset + len(view)]
        clock.read += time.perf_counter() - began
        clock.bytes_read += len(view)

    def write(self, clock: StageClock, path: Path, offset: int, data: memoryview) -> None:
        self._put(path, offset, data)
        clock.bytes_written += data.nbytes

    def copy(
        self, clock: StageClock, ref: TensorRef, start: int, size: int, path: Path, offset: int
    ) -> None:
        buffer = memoryview(bytearray(size))
        self.read_stored(clock, ref, start // DTYPES[ref.dtype][0], buffer)
        self._put(path, offset, buffer)

    def close(self) -> None:
        """Let go of files and memory."""
        self._disk.close()
        self._kept.clear()
        self.on_device.clear()

    def _put(self, path: Path, offset: int, data: memoryview) -> None:
        import numpy as np

        raw = np.frombuffer(data.cast("B"), np.uint8)
        target = self.outputs[path][offset : offset + len(raw)]
        if isinstance(target, np.ndarray):
            target[:] = raw
        else:
            import torch

            target.copy_(torch.from_numpy(raw.copy()))


class InMemoryWorker(StagedWorker):
    """A lane whose operands wait on the device, and whose results stay there."""

    _files: InMemoryFiles

    def _bring(self, refs: Sequence[Tensor], start: int, stop: int) -> list[Any]:
        return [self._own(ref, start, stop) for ref in refs]

    def _own(self, tensor: Tensor, start: int, stop: int) -> Any:
        (ref, *others) = tensor.stored
        kept = None if others or tensor.formula else self._files.on_device.get(_where(ref))
        if kept is None:  # computed on the way, on the host
            return super()._bring([tensor], start, stop)[0]
        width = DTYPES[tensor.dtype][0]
        # A copy: what is computed with may be changed in place.
        return kept[start * width : stop * width].clone()

    def _give(self, stored: Any, path: Path, offset: int) -> None:
        self._files.outputs[path][offset : offset + stored.numel()].copy_(stored)
        self._transfers.wait()  # another lane, on another stream, may look at the whole tensor next


def _where(ref: TensorRef) -> tuple[Path, int]:
    return ref.path, ref.offset


def in_memory_workers(
    files: InMemoryFiles, device: Device, block: int
) -> Callable[[int], WorkerContext]:
    """What makes a pool's lanes over sources that wait on a CUDA device."""
    return lambda number: InMemoryWorker(files, CudaTransfers(device.indexes[0]), block)


_REMEMBERED = 4  # answers of a method's `prepare` for each tensor
Prepared = OrderedDict[str, Any]
Take = Callable[[TensorTask, Any], None]


class _Remembering(MergeExecutor):
    """A Computer whose `prepare` answers from memory where it was asked the same before."""

    remembered: dict[str, Prepared]

    def prepare(self, reader: TensorReader, task: TensorTask) -> Any:
        uses = self._method.cache_key_parameters
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
            result = resolver.of(task.formula_name, task.position)
            if result.error:
                raise RecipeError([recipe.problem("merge_method", result.error)])
            copies = result.copies and is_stored_as(task.operands[0], task.dtype)
            tasks.append(
                replace(task, parameters=result.parameters, action="copy" if copies else "merge")
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

        requested = set(changed)
        jobs = [_MergeJob(tasks[n], tuple(self._units[n])) for n in self._order if n in requested]
        with one_torch_thread(self._device, self._arithmetic), memory_errors(resumes=False):
            if jobs and self._plan.method.model_pass is not None:
                self._pool.map(survey, [None])
                self.surveys = computer.surveyed
            self._pool.map(work, jobs)
        if self._device.kind == "cuda":
            import torch

            torch.cuda.synchronize()

    def close(self) -> None:
        self._pool.__exit__(None, None, None)
