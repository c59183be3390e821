"""Measuring models: every tensor is read once, in blocks, on the engine's pool of threads.

Memory is the workers' buffers and a few matrices of S x S for each tensor. Sums are kept by chunk
and added in the chunks' order, so that threads, blocks and devices of a kind do not matter. Small
tensors are read and measured many at a time, by a compiled loop: a mixture of experts has tens of
thousands.
"""

from __future__ import annotations

import os
import queue
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from merge_cli.analysis.model_set import ModelSet
from merge_cli.analysis.spectra import Spectrum, choose_tensors, spectrum_of
from merge_cli.checkpoint.non_finite import non_finite_error
from merge_cli.engine.device import Device
from merge_cli.engine.files import Files
from merge_cli.engine.loop import task_batches
from merge_cli.engine.memory import keep_freed_memory, worker_memory
from merge_cli.engine.operands import BlockReader, TensorReader
from merge_cli.engine.pool import (
    Pool,
    arithmetic_for,
    memory_errors,
    one_torch_thread,
    worker_factory,
)
from merge_cli.engine.worker_context import HostWorker, WorkerContext
from merge_cli.errors import NonFiniteError
from merge_cli.kernels.backend import to_numpy
from merge_cli.kernels.measures import Relations, add_relations, top_threshold
from merge_cli.kernels.relation_streams import RelationStreams
from merge_cli.kernels.streams import Stored
from merge_cli.methods.blocks import Block
from merge_cli.options import MergeOptions, OnProgress, Progress
from merge_cli.planning.chunks import span_starts
from merge_cli.planning.plan import TensorTask
from merge_cli.system.raw_io import FilePool

TOP_SHARE = 0.01  # of a tensor's elements: its largest changes
_SAMPLE = 131_072  # elements that the threshold is estimated from; all of a smaller tensor


@dataclass(frozen=True)
class Measurements:
    """What was measured; `sums` are in the order of the plan's tasks."""

    sums: tuple[Relations, ...]
    spectra: tuple[Spectrum, ...]
    arithmetic: str
    threads: int
    seconds: float


def measure_models(
    model_set: ModelSet, device: Device, options: MergeOptions, on_progress: OnProgress
) -> Measurements:
    """Read every tensor once and measure it.

    Raises:
        SourceError: a file that is missing or cannot be read.
        NonFiniteError: NaN or Inf among the weights.
        ResourceError: memory ran out.
    """
    plan = model_set.plan
    began = time.perf_counter()
    if not plan.tasks:
        return Measurements((), (), "", 0, 0.0)
    arithmetic, _ = arithmetic_for(plan, device)
    memory = worker_memory(plan, device, options)
    files = Files(FilePool(os.O_RDONLY), FilePool(os.O_RDWR))
    pool = Pool(worker_factory(files, device, arithmetic, memory), memory.workers)
    block_reader = BlockReader(pool, files, plan.recipe.seed, deltas=False)
    messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
    tensors = _TensorSums(plan.tasks, block_reader, messages.put)
    sampled = choose_tensors(plan.tasks, plan.recipe.seed) if model_set.base else []
    spectra: list[Spectrum | None] = [None] * len(sampled)

    def measure(job: Sequence[int] | int) -> None:
        if isinstance(job, int):
            spectra[job] = spectrum_of(sampled[job], pool.worker, plan.recipe.seed)
        else:
            tensors.measure(job)

    # The largest first, so that threads finish at about the same time.
    order = sorted(range(len(plan.tasks)), key=lambda i: (-plan.tasks[i].bytes_read, i))
    jobs = [*task_batches(plan, order, memory.workers), *range(len(sampled))]
    total, done = plan.bytes_read, 0
    keep_freed_memory()
    try:
        with one_torch_thread(device, arithmetic), memory_errors(resumes=False), pool:
            on_progress(Progress("analyze", 0, total))
            pool.start(measure, jobs, messages)
            while (message := messages.get()) is not None:
                if isinstance(message, BaseException):
                    raise message
                done += message
                on_progress(Progress("analyze", done, total))
    finally:
        files.sources.close()
    seconds = time.perf_counter() - began
    present = tuple(spectrum for spectrum in spectra if spectrum is not None)
    return Measurements(tuple(tensors.sums), present, arithmetic, memory.workers, seconds)


class _TensorSums:
    """The sums of each tensor; `measure` is called by the pool's threads.

    Args:
        on_measured: called with the number of bytes read when they are measured.
    """

    def __init__(
        self,
        tasks: Sequence[TensorTask],
        reader: BlockReader,
        on_measured: Callable[[int], None],
    ) -> None:
        self._tasks, self._reader, self._on_measured = tasks, reader, on_measured
        self.sums: list[Relations] = [Relations.empty(0)] * len(tasks)  # until it is measured

    def measure(self, numbers: Sequence[int]) -> None:
        """Measure these tensors, the small ones in one call of a loop."""
        small: dict[int, list[Stored]] = {}
        for number in numbers:
            reader = self._reader_of(number)
            inputs = _small_inputs(reader, self._reader.pool.worker)
            if inputs is None:
                self.sums[number] = self._of_large(reader)
            else:
                small[number] = inputs
        if small:
            self._stream(small)

    def _reader_of(self, number: int) -> TensorReader:
        task = self._tasks[number]
        return TensorReader(task, self._reader, span_starts(task))

    def _stream(self, small: Mapping[int, Sequence[Stored]]) -> None:
        """One call for all of them; what the loop leaves over is measured in the plain way."""
        numbers = [*small]
        spans = [(0, self._tasks[number].size) for number in numbers]
        streams = RelationStreams([*small.values()], spans, TOP_SHARE)
        worker = cast(HostWorker, self._reader.pool.worker)
        left_over: set[int] = set()
        position = 0
        while (position := worker.run_streams(streams, position)) < len(numbers):
            left_over.add(numbers[position])
            position += 1
        for number, sums in zip(numbers, streams.sums(), strict=True):
            is_left = number in left_over
            self.sums[number] = self._of_large(self._reader_of(number)) if is_left else sums
        done = sum(self._tasks[number].bytes_read for number in numbers if number not in left_over)
        self._on_measured(done)

    def _of_large(self, reader: TensorReader) -> Relations:
        """The sums over one tensor, span by span."""
        task, total = reader.task, Relations.empty(len(reader.task.operands) - 1)
        if not task.size:
            return total
        width = task.bytes_read // task.size
        # A small tensor is read once: its sample is all of it.
        complete = [*_sample(reader)] if task.size <= _SAMPLE else None
        thresholds = _thresholds(complete) if complete else _thresholds_by_sample(reader)

        def of_span(number: int) -> Relations:
            sums = self._streamed(reader, number, thresholds)
            if sums is None:
                blocks = (_differences(block, task) for block in reader.span(number))
                sums = _related(blocks, thresholds)
            self._on_measured(sums.count * width)
            return sums

        if complete is not None:
            parts = [_related(complete, thresholds)]
            self._on_measured(task.bytes_read)
        else:
            parts = self._reader.pool.map(of_span, range(len(reader.starts) - 1))
        for sums in parts:
            total.add(sums)
        total.set_chance()
        return total

    def _streamed(
        self, reader: TensorReader, number: int, thresholds: Sequence[float]
    ) -> Relations | None:
        """The sums over a span in one call of a loop; None where that is not possible."""
        worker = self._reader.pool.worker
        if not (isinstance(worker, HostWorker) and reader.can_be_stored):
            return None
        inputs = worker.stored_inputs(reader.task.inputs)
        if inputs is None:
            return None
        reader.read_ahead(number + 1)
        span = reader.starts[number], reader.starts[number + 1]
        streams = RelationStreams([inputs], [span], TOP_SHARE, thresholds)
        return next(streams.sums()) if worker.run_streams(streams, 0) else None


def _related(blocks: Iterable[Sequence[Any]], thresholds: Sequence[float]) -> Relations:
    """The sums over blocks of a base and the others' differences from it."""
    sums = Relations.empty(len(thresholds))
    for rows in blocks:
        add_relations(rows, thresholds, sums)
    return sums


def _small_inputs(reader: TensorReader, worker: WorkerContext) -> list[Stored] | None:
    """Where a tensor lies that compiled loops can read whole; None for others."""
    task = reader.task
    if not 0 < task.size <= min(_SAMPLE, worker.block) or not reader.can_be_stored:
        return None
    return cast(HostWorker, worker).stored_inputs(task.inputs)


def _sample(reader: TensorReader) -> Iterator[Sequence[Any]]:
    """Blocks at positions that only depend on the tensor's size; all of a small one, in order."""
    for block in reader.sample(_SAMPLE):
        yield _differences(block, reader.task)


def _thresholds_by_sample(reader: TensorReader) -> list[float]:
    keys = reader.sample_keys(_SAMPLE, based=True)
    if keys is None:
        return _thresholds(_sample(reader))
    return [top_threshold(row.view("float32"), TOP_SHARE) for row in keys]  # keys are magnitudes


def _thresholds(sample: Iterable[Sequence[Any]]) -> list[float]:
    """For each source, the smallest magnitude of its largest changes."""
    import numpy as np

    changes = [[to_numpy(delta) for delta in rows[1:]] for rows in sample]
    return [
        top_threshold(np.concatenate(of_source), TOP_SHARE)
        for of_source in zip(*changes, strict=True)
    ]


def _differences(block: Block, task: TensorTask) -> Sequence[Any]:
    """The first model's values, and the others' differences from them; changes the block."""
    first, *others = block.operands
    if not block.finite:
        raise _non_finite(block.operands, task, block.at.start)
    for values in others:
        values -= first
    return block.operands


def _non_finite(operands: Sequence[Any], task: TensorTask, start: int) -> NonFiniteError:
    import numpy as np

    marks = [~np.isfinite(to_numpy(v)) for v in operands]
    tensor, is_bad = next(
        operand for operand in zip(task.operands, marks, strict=True) if operand[1].any()
    )
    element, useless = start + int(is_bad.argmax()), "No distance to such a model has a meaning"
    hint, together = f"{useless}: replace the file.", f"{useless}."
    return non_finite_error(tensor, element, hint=hint, together=together)
