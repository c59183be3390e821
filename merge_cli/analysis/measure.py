"""Measuring models: every tensor is read once, in blocks, on the engine's pool of threads.

Memory is the workers' buffers and a few matrices of S x S for each tensor. Sums are kept by chunk
and added in the chunks' order, so that threads, blocks and devices of a kind do not matter.

Sampled matrices also give the effective rank of a change, its number of directions.
The effective rank of a matrix with singular values σ is exp(H(p)), p = σ / Σσ, H the entropy: Roy
and Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007. It is 1 for
a matrix of rank one and n for n equal singular values. The stable rank is Σσ² / max σ².

Complete matrices would take longer than everything else together. So a few matrices of each kind
of module are chosen, and of each at most 256 rows and 256 columns, by a generator that depends only
on the seed and the tensor's name. The rank of a sample is at most its smaller side: ranks are
compared as shares of that side.
"""

from __future__ import annotations

import hashlib
import math
import os
import queue
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from merge_cli.analysis.measures import rounded
from merge_cli.analysis.model_set import ModelSet, kind_of
from merge_cli.engine.device import Device
from merge_cli.engine.files import Files
from merge_cli.engine.memory import keep_freed_memory, worker_memory
from merge_cli.engine.operands import BlockReader, TensorReader
from merge_cli.engine.pool import (
    Pool,
    arithmetic_for,
    memory_errors,
    one_torch_thread,
    worker_factory,
)
from merge_cli.engine.worker_context import WorkerContext
from merge_cli.errors import NonFiniteError
from merge_cli.kernels.backend import to_numpy
from merge_cli.kernels.matrices import singular_values
from merge_cli.kernels.measures import Relations, add_relations, top_threshold
from merge_cli.methods.blocks import Block
from merge_cli.options import MergeOptions, OnProgress, Progress
from merge_cli.planning.plan import TensorTask, span_starts
from merge_cli.system.raw_io import FilePool

TOP_SHARE = 0.01  # of a tensor's elements: its largest changes
_SAMPLE = 131_072  # elements that the threshold is estimated from; all of a smaller tensor
SIDE = 256  # rows and columns of a sample, at most
_PER_KIND = 3  # matrices of a kind
_MIN_SIDE = 16  # rows and columns of a matrix that is sampled
_WINDOW = 65_536  # columns to choose from: any worker's buffers hold them


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
    sums: list[Relations] = [Relations.empty(0)] * len(plan.tasks)
    sampled = choose_tensors(plan.tasks, plan.recipe.seed) if model_set.base else []
    spectra: list[Spectrum | None] = [None] * len(sampled)
    messages: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def measure(job: tuple[str, int]) -> None:
        kind, number = job
        if kind == "sample":
            spectra[number] = spectrum_of(sampled[number], pool.worker, plan.recipe.seed)
        else:
            task = plan.tasks[number]
            sums[number] = _relations(TensorReader(task, block_reader, span_starts(task)), messages)

    # The largest first, so that threads finish at about the same time.
    order = sorted(range(len(plan.tasks)), key=lambda i: (-plan.tasks[i].bytes_read, i))
    jobs = [("tensor", i) for i in order] + [("sample", i) for i in range(len(sampled))]
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
    return Measurements(tuple(sums), present, arithmetic, memory.workers, seconds)


def _relations(reader: TensorReader, messages: queue.SimpleQueue[Any]) -> Relations:
    """The sums over one tensor."""
    task, total = reader.task, Relations.empty(len(reader.task.operands) - 1)
    if not task.size:
        return total
    width = task.bytes_read // task.size
    # A small tensor is read once: its sample is all of it.
    complete = [*_sample(reader)] if task.size <= _SAMPLE else None
    thresholds = _thresholds(complete if complete is not None else _sample(reader))

    def add(blocks: Iterable[Sequence[Any]]) -> Relations:
        sums = Relations.empty(len(task.operands) - 1)
        for rows in blocks:
            add_relations(rows, thresholds, sums)
        messages.put(sums.count * width)
        return sums

    parts = (
        [add(complete)]
        if complete is not None
        else reader.map(lambda blocks: add(_differences(block, task) for block in blocks))
    )
    for sums in parts:
        total.add(sums)
    total.set_chance()
    return total


def _sample(reader: TensorReader) -> Iterator[Sequence[Any]]:
    """Blocks at positions that only depend on the tensor's size; all of a small one, in order."""
    for block in reader.sample(_SAMPLE):
        yield _differences(block, reader.task)


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
    message = f"NaN or Inf among its weights (first at element {start + int(is_bad.argmax())})"
    hint = "No distance to such a model has a meaning: replace the file."
    file = tensor.stored[0].path.name
    return NonFiniteError(message, model=tensor.model, file=file, tensor=tensor.name, hint=hint)


@dataclass(frozen=True)
class Spectrum:
    """Ranks of one sampled matrix, for each source.

    Attributes:
        shape: of the complete tensor; `rows` and `columns` are the sample's.
        effective_rank, stable_rank: see above; None where nothing changed.
        rank_99: singular values that hold 99 % of the sum of squares.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    rows: int
    columns: int
    effective_rank: tuple[float | None, ...]
    stable_rank: tuple[float | None, ...]
    rank_99: tuple[int | None, ...]


def choose_tensors(tasks: Sequence[TensorTask], seed: int) -> list[TensorTask]:
    """A few matrices of each kind of module: those whose names hash lowest with the seed."""
    by_kind: dict[str, list[TensorTask]] = {}
    for task in tasks:
        if len(task.shape) == 2 and min(task.shape) >= _MIN_SIDE:
            by_kind.setdefault(kind_of(task.name), []).append(task)
    return [
        task
        for matrices in by_kind.values()
        for task in sorted(matrices, key=lambda task: _hash(seed, task.name))[:_PER_KIND]
    ]


def _hash(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}/{name}".encode()).digest()


def sample_positions(shape: Sequence[int], seed: int, name: str) -> tuple[list[int], list[int]]:
    """The rows and columns of a matrix that are sampled, in ascending order."""
    generator = random.Random(f"{seed}/{name}")
    rows = sorted(generator.sample(range(shape[0]), min(shape[0], SIDE)))
    width = min(shape[1], _WINDOW)
    return rows, sorted(generator.sample(range(width), min(width, SIDE)))


def spectrum_of(task: TensorTask, worker: WorkerContext, seed: int) -> Spectrum:
    """Read a sample of every source's change and measure it.

    Args:
        task: a matrix; its first operand is the base.
    """
    import numpy as np

    rows, columns = sample_positions(task.shape, seed, task.name)
    width = min(task.shape[1], _WINDOW)
    deltas = np.empty((len(task.operands) - 1, len(rows), len(columns)))
    for i, row in enumerate(rows):
        start = row * task.shape[1]
        loaded = worker.load(task.operands, start, start + width, base=True, deltas=True)
        for delta, values in zip(deltas, loaded.operands, strict=True):
            delta[i] = to_numpy(values)[columns]
    ranks = [_ranks(delta) for delta in deltas]
    return Spectrum(
        task.name,
        kind_of(task.name),
        tuple(task.shape),
        len(rows),
        len(columns),
        tuple(effective for effective, _, _ in ranks),
        tuple(stable for _, stable, _ in ranks),
        tuple(rank for _, _, rank in ranks),
    )


def _ranks(matrix: Any) -> tuple[float | None, float | None, int | None]:
    import numpy as np

    largest = np.abs(matrix).max()
    if not largest or not np.isfinite(largest):
        return None, None, None
    values = singular_values(matrix / largest)
    squares = values * values
    share = np.cumsum(squares) / squares.sum()
    rank = int(np.searchsorted(share, 0.99)) + 1
    return rounded(effective_rank(values)), rounded(squares.sum() / squares[0]), rank


def effective_rank(singular: Any) -> float:
    """exp of the entropy of the normalised singular values (not all of them 0)."""
    import numpy as np

    shares = singular / singular.sum()
    shares = shares[shares > 0]
    return float(math.exp(-(shares * np.log(shares)).sum()))
