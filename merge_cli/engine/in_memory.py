"""The engine with memory in the place of files: what searches and adapter merges use.

`InMemoryFiles` keeps the sources' stored bytes and gives every output tensor a buffer;
`InMemoryMerger` runs one method over one set of sources, its threads kept from merge to merge. The
engine computes with the same bytes that lie on disk, so the weights of a candidate are bit for bit
what a merge of its recipe writes.
"""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from merge_cli.checkpoint.dtypes import width_of
from merge_cli.checkpoint.headers import TensorRef
from merge_cli.checkpoint.tensors import Tensor
from merge_cli.engine.device import Device
from merge_cli.engine.device_worker import CudaTransfers, StagedWorker
from merge_cli.engine.executor import MergeExecutor
from merge_cli.engine.files import Files, StageClock
from merge_cli.engine.memory import worker_memory
from merge_cli.engine.operands import BlockReader, TensorReader
from merge_cli.engine.pool import (
    Pool,
    arithmetic_for,
    memory_errors,
    one_torch_thread,
    worker_factory,
)
from merge_cli.engine.residency import Residency, SourceResidency
from merge_cli.engine.worker_context import WorkerContext
from merge_cli.options import MergeOptions
from merge_cli.planning.chunks import Chunk, cut_chunks
from merge_cli.planning.plan import Plan, TensorTask
from merge_cli.system.raw_io import FilePool, read_into


class InMemoryFiles(Files):
    """Sources from memory (or disk), outputs into buffers.

    Args:
        device: torch's word for where sources of the residency `device` wait.

    Attributes:
        outputs: for each path that is written to, uint8 (numpy; torch with the residency `device`);
            put here before, taken out after.
        on_device: stored tensors that wait there, torch uint8.
    """

    on_disk = False

    def __init__(self, residency: SourceResidency, device: str = "cpu") -> None:
        self._disk = FilePool(os.O_RDONLY)
        super().__init__(self._disk, self._disk)
        self._residency, self._device = residency.residency, device
        self._host: dict[tuple[Path, int], memoryview] = {}
        self.on_device: dict[tuple[Path, int], Any] = {}
        self.outputs: dict[Path, Any] = {}

    def buffer(self, size: int) -> Any:
        """What an output of so many bytes is written into."""
        if self._residency == "device":
            import torch

            return torch.empty(size, dtype=torch.uint8, device=self._device)
        import numpy as np

        return np.empty(size, np.uint8)

    def keep(self, refs: Iterable[TensorRef]) -> None:
        """Read tensors into memory, unless they stay on disk; each once."""
        if self._residency == "disk":
            return
        for ref in refs:
            key = ref.path, ref.offset
            if key in self._host or key in self.on_device:
                continue
            buffer = memoryview(bytearray(ref.nbytes))
            if ref.nbytes:
                read_into(self._disk, ref.path, ref.offset, buffer, ref.model)
            if self._residency == "device":
                import torch

                host = torch.frombuffer(buffer, dtype=torch.uint8) if ref.nbytes else torch.empty(0)
                self.on_device[key] = host.to(self._device, torch.uint8)
            else:
                self._host[key] = buffer

    def ask_for(self, ref: TensorRef, start: int, size: int) -> None:
        if self._residency == "disk":
            super().ask_for(ref, start, size)

    def read_stored(
        self, clock: StageClock, ref: TensorRef, start: int, buffer: memoryview
    ) -> None:
        cached = self._host.get((ref.path, ref.offset))
        if cached is None:  # on disk; or on the device, and needed on the host for once
            super().read_stored(clock, ref, start, buffer)
            return
        began = time.perf_counter()
        offset = start * width_of(ref.dtype)
        target = buffer.cast("B")
        target[:] = cached[offset : offset + len(target)]
        clock.read += time.perf_counter() - began
        clock.bytes_read += len(target)

    def write(self, clock: StageClock, path: Path, offset: int, data: memoryview) -> None:
        self._put(path, offset, data)
        clock.bytes_written += data.nbytes

    def copy(
        self, clock: StageClock, ref: TensorRef, start: int, size: int, path: Path, offset: int
    ) -> None:
        buffer = memoryview(bytearray(size))
        self.read_stored(clock, ref, start // width_of(ref.dtype), buffer)
        self._put(path, offset, buffer)

    def close(self) -> None:
        """Let go of files and memory."""
        self._disk.close()
        self._host.clear()
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
    """A worker whose operands wait on the device, and whose results stay there."""

    _files: InMemoryFiles

    def _bring(self, refs: Sequence[Tensor], start: int, stop: int) -> list[Any]:
        return [self._tensor_on_device(ref, start, stop) for ref in refs]

    def _tensor_on_device(self, tensor: Tensor, start: int, stop: int) -> Any:
        (ref, *others) = tensor.stored
        cached = None if others or tensor.formula else self._files.on_device.get(_where(ref))
        if cached is None:  # computed on the way, on the host
            return super()._bring([tensor], start, stop)[0]
        width = width_of(tensor.dtype)
        # A copy: what is computed with may be changed in place.
        return cached[start * width : stop * width].clone()

    def _give(self, stored: Any, path: Path, offset: int) -> None:
        self._files.outputs[path][offset : offset + stored.numel()].copy_(stored)
        # Another worker, on another stream, may look at the whole tensor next.
        self._transfers.wait()


def _where(ref: TensorRef) -> tuple[Path, int]:
    return ref.path, ref.offset


def in_memory_workers(
    files: InMemoryFiles, device: Device, block: int
) -> Callable[[int], WorkerContext]:
    """What makes a pool's workers over sources that wait on a CUDA device."""
    return lambda number: InMemoryWorker(files, CudaTransfers(device.indexes[0]), block)


# Answers of a method's `prepare` for each tensor. Candidates of a search often differ in weights
# alone: the threshold of a density is then found once, not once for each candidate.
_CACHED = 4
Prepared = OrderedDict[str, Any]
Take = Callable[[TensorTask, Any], None]


class _CachingExecutor(MergeExecutor):
    """A MergeExecutor whose `prepare` answers from memory where it was asked the same before."""

    cache: dict[str, Prepared]

    def prepare(self, reader: TensorReader, task: TensorTask) -> Any:
        uses = self._method.cache_key_parameters
        if uses is None or self.model_pass is not None:
            return super().prepare(reader, task)
        key = repr([(name, task.parameters[name]) for name in uses])
        answers = self.cache.setdefault(task.name, OrderedDict())
        if key not in answers:
            answers[key] = super().prepare(reader, task)
            if len(answers) > _CACHED:
                answers.popitem(last=False)
        return answers[key]


@dataclass(frozen=True)
class _MergeJob:
    task: TensorTask
    chunks: tuple[Chunk, ...]


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
        chunks: dict[int, list[Chunk]] = {}
        for chunk in cut_chunks(plan.tasks):
            chunks.setdefault(chunk.task, []).append(chunk)
        self._chunks = chunks
        self._order = sorted(chunks, key=lambda task: (-plan.tasks[task].bytes_read, task))
        self._offsets = {task.name: (Path(task.name), 0) for task in plan.tasks}
        self._prepared: dict[str, Prepared] = {}
        self.has_model_pass = False
        self._arithmetic, _ = arithmetic_for(plan, device)
        room = worker_memory(plan, device, options)
        make_context = (
            in_memory_workers(files, device, room.block)
            if residency == "device"
            else worker_factory(files, device, self._arithmetic, room)
        )
        self._pool = Pool(make_context, room.workers)
        self._reader = BlockReader(
            self._pool, files, plan.recipe.seed, "deltas" in plan.method.supplied
        )
        self._pool.__enter__()

    def merge(self, tasks: Sequence[TensorTask], changed: Sequence[int], take: Any) -> None:
        """Merge some of the tasks; `take(task, bytes)` gets each result."""
        executor = _CachingExecutor(
            replace(self._plan, tasks=tuple(tasks)),
            self._reader,
            self._offsets,
            statistics=False,
            allow_non_finite=self._options.allow_non_finite,
        )
        executor.cache = self._prepared

        def read_model(_: None) -> None:
            executor.run_model_pass(lambda: None)

        def work(job: _MergeJob) -> None:
            if not job.task.size:
                return
            path, _ = self._offsets[job.task.name]
            output = self._files.buffer(job.task.size * width_of(job.task.dtype))
            self._files.outputs[path] = output
            try:
                executor.merge(job.task, job.chunks, lambda chunk, stats: None)
            finally:
                del self._files.outputs[path]
            take(job.task, output)

        requested = set(changed)
        jobs = [_MergeJob(tasks[n], tuple(self._chunks[n])) for n in self._order if n in requested]
        with one_torch_thread(self._device, self._arithmetic), memory_errors(resumes=False):
            if jobs and self._plan.method.model_pass is not None:
                self._pool.map(read_model, [None])
                self.has_model_pass = executor.has_model_pass
            self._pool.map(work, jobs)
        if self._device.kind == "cuda":
            import torch

            torch.cuda.synchronize()

    def close(self) -> None:
        self._pool.__exit__(None, None, None)
