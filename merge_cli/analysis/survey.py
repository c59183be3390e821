"""The streamed pass: every tensor of every model once, in blocks, on the engine's pool.

Memory is what the lanes hold and a few matrices of S x S for each tensor. Sums are kept by span and
added in the spans' order, so that threads, blocks and devices of a kind do not matter.
"""

from __future__ import annotations

import os
import queue
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from merge_cli.analysis.spectrum import Spectrum, choose_tensors, spectrum_of
from merge_cli.analysis.subject import ModelSet
from merge_cli.checkpoint.raw import FilePool
from merge_cli.engine.device import Device
from merge_cli.engine.lanes import Files
from merge_cli.engine.memory import keep_freed_memory, worker_memory
from merge_cli.engine.operands import BlockReader, TensorReader
from merge_cli.engine.options import MergeOptions, OnProgress, Progress
from merge_cli.engine.plan import TensorTask
from merge_cli.engine.pool import Pool
from merge_cli.engine.units import span_starts
from merge_cli.engine.workers import arithmetic_for, memory_errors, one_torch_thread, worker_factory
from merge_cli.errors import NonFiniteError
from merge_cli.kernels.arrays import is_numpy
from merge_cli.kernels.relate import Relations, add_relations, top_threshold
from merge_cli.methods.blocks import Block

TOP_SHARE = 0.01  # of a tensor's entries: its largest changes
_SAMPLE = 131_072  # elements that say where they begin; all of a smaller tensor


@dataclass(frozen=True)
class Measurements:
    """What the pass found: `sums` follow the plan's tasks."""

    sums: tuple[Relations, ...]
    spectra: tuple[Spectrum, ...]
    arithmetic: str
    threads: int
    seconds: float


def measure_models(
    subject: ModelSet, device: Device, options: MergeOptions, show: OnProgress
) -> Measurements:
    """Read everything once.

    Raises:
        SourceError: a file that vanished or cannot be read.
        NonFiniteError: NaN or Inf among the weights.
        ResourceError: memory ran out.
    """
    plan = subject.plan
    began = time.perf_counter()
    if not plan.tasks:
        return Measurements((), (), "", 0, 0.0)
    arithmetic, _ = arithmetic_for(plan, device)
    room = worker_memory(plan, device, options)
    files = Files(FilePool(os.O_RDONLY), FilePool(os.O_RDWR))
    pool = Pool(worker_factory(files, device, arithmetic, room), room.lanes)
    reading = BlockReader(pool, files, plan.recipe.seed, deltas=False)
    sums: list[Relations] = [Relations.empty(0)] * len(plan.tasks)
    sampled = choose_tensors(plan.tasks, plan.recipe.seed) if subject.base else []
    spectra: list[Spectrum | None] = [None] * len(sampled)
    messages: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def work(job: tuple[str, int]) -> None:
        kind, number = job
        if kind == "sample":
            spectra[number] = spectrum_of(sampled[number], pool.lane, plan.recipe.seed)
        else:
            task = plan.tasks[number]
            sums[number] = _relations(TensorReader(task, reading, span_starts(task)), messages)

    # The largest first, so that no thread is left alone with one at the end.
    order = sorted(range(len(plan.tasks)), key=lambda i: (-plan.tasks[i].bytes_read, i))
    jobs = [("tensor", i) for i in order] + [("sample", i) for i in range(len(sampled))]
    total, done = plan.bytes_read, 0
    keep_freed_memory()
    try:
        with one_torch_thread(device, arithmetic), memory_errors(resumes=False), pool:
            show(Progress("analyze", 0, total))
            pool.start(work, jobs, messages)
            while (message := messages.get()) is not None:
                if isinstance(message, BaseException):
                    raise message
                done += message
                show(Progress("analyze", done, total))
    finally:
        files.sources.close()
    seconds = time.perf_counter() - began
    found = tuple(spectrum for spectrum in spectra if spectrum is not None)
    return Measurements(tuple(sums), found, arithmetic, room.lanes, seconds)


def _relations(reader: TensorReader, messages: queue.SimpleQueue[Any]) -> Relations:
    """The sums of one tensor."""
    task, total = reader.task, Relations.empty(len(reader.task.operands) - 1)
    if not task.size:
        return total
    width = task.bytes_read // task.size
    # A small tensor is read once: what thresholds are taken from is all of it.
    whole = [*_sample(reader)] if task.size <= _SAMPLE else None
    thresholds = _thresholds(whole if whole is not None else _sample(reader))

    def add(blocks: Iterable[Sequence[Any]]) -> Relations:
        sums = Relations.empty(len(task.operands) - 1)
        for rows in blocks:
            add_relations(rows, thresholds, sums)
        messages.put(sums.count * width)
        return sums

    parts = (
        [add(whole)]
        if whole is not None
        else reader.map(lambda blocks: add(_differences(block, task) for block in blocks))
    )
    for sums in parts:
        total.add(sums)
    total.set_chance()
    return total


def _sample(reader: TensorReader) -> Iterator[Sequence[Any]]:
    """Blocks at places that only depend on the tensor's size; all of a small one, in order."""
    for block in reader.sample(_SAMPLE):
        yield _differences(block, reader.task)


def _thresholds(sample: Iterable[Sequence[Any]]) -> list[float]:
    """For each source, the magnitude at which its largest changes begin."""
    import numpy as np

    found = [
        [delta if is_numpy(delta) else delta.cpu().numpy() for delta in rows[1:]] for rows in sample
    ]
    return [top_threshold(np.concatenate(kept), TOP_SHARE) for kept in zip(*found, strict=True)]


def _differences(block: Block, task: TensorTask) -> Sequence[Any]:
    """The first model's values, and those of the others less them; in the block's own memory."""
    first, *others = block.operands
    if not block.finite:
        raise _non_finite(block.operands, task, block.at.start)
    for values in others:
        values -= first
    return block.operands


def _non_finite(operands: Sequence[Any], task: TensorTask, start: int) -> NonFiniteError:
    import numpy as np

    marks = [~np.isfinite(v if is_numpy(v) else v.cpu().numpy()) for v in operands]
    ref, bad = next(found for found in zip(task.operands, marks, strict=True) if found[1].any())
    what = f"NaN or Inf among its weights (first at element {start + int(bad.argmax())})"
    hint = "No distance to such a model means anything: replace the file."
    file = ref.stored[0].path.name
    return NonFiniteError(what, model=ref.model, file=file, tensor=ref.name, hint=hint)
