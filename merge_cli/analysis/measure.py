"""The streamed pass: every tensor of every model once, in blocks, on the engine's pool.

Memory is what the lanes hold and a few matrices of S x S for each tensor. Sums are kept by span and
added in the spans' order, so that threads, blocks and devices of a kind do not matter.

How many directions a change has: the effective rank of sampled matrices.

The effective rank of a matrix with singular values σ is exp(H(p)), p = σ / Σσ, H the entropy: Roy
and Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007. It is 1 for
a matrix of rank one and n for n equal singular values. The stable rank is Σσ² / max σ².

Whole matrices would take longer than everything else together. So a few matrices of each kind of
module are chosen, and of each at most 256 rows and 256 columns, by a generator that depends on the
seed and the tensor's name alone. A submatrix has a rank of at most its smaller side: the share of
that side is what compares.
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

from merge_cli.analysis.model_set import ModelSet, kind_of
from merge_cli.engine.device import Device
from merge_cli.engine.memory import keep_freed_memory, worker_memory
from merge_cli.engine.operands import BlockReader, TensorReader
from merge_cli.engine.options import MergeOptions, OnProgress, Progress
from merge_cli.engine.pool import (
    Pool,
    arithmetic_for,
    memory_errors,
    one_torch_thread,
    worker_factory,
)
from merge_cli.engine.worker_context import Files, WorkerContext
from merge_cli.errors import NonFiniteError
from merge_cli.kernels.backend import to_numpy
from merge_cli.kernels.matrices import singular_values
from merge_cli.kernels.measures import Relations, add_relations, top_threshold
from merge_cli.methods.blocks import Block
from merge_cli.planning.plan import TensorTask, span_starts
from merge_cli.system.raw_io import FilePool

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
    result = tuple(spectrum for spectrum in spectra if spectrum is not None)
    return Measurements(tuple(sums), result, arithmetic, room.lanes, seconds)


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

    found = [[to_numpy(delta) for delta in rows[1:]] for rows in sample]
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

    marks = [~np.isfinite(to_numpy(operand)) for operand in operands]
    ref, bad = next(
        operand for operand in zip(task.operands, marks, strict=True) if operand[1].any()
    )
    message = f"NaN or Inf among its weights (first at element {start + int(bad.argmax())})"
    hint = "No distance to such a model means anything: replace the file."
    file = ref.stored[0].path.name
    return NonFiniteError(message, model=ref.model, file=file, tensor=ref.name, hint=hint)


SIDE = 256  # rows and columns of a sample, at most
_EACH = 3  # matrices of a kind
_LEAST = 16  # rows and columns that are worth it
_WINDOW = 65_536  # columns to choose from: what any lane takes at once


@dataclass(frozen=True)
class Spectrum:
    """The singular values of one sampled matrix in numbers, for each source.

    Attributes:
        shape: of the whole tensor; `rows` and `columns` are the sample's.
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
    """A few matrices of every kind of module: those whose names hash lowest with the seed."""
    by_kind: dict[str, list[TensorTask]] = {}
    for task in tasks:
        if len(task.shape) == 2 and min(task.shape) >= _LEAST:
            by_kind.setdefault(kind_of(task.name), []).append(task)
    return [
        task
        for found in by_kind.values()
        for task in sorted(found, key=lambda task: _hash(seed, task.name))[:_EACH]
    ]


def _hash(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}/{name}".encode()).digest()


def sample_positions(shape: Sequence[int], seed: int, name: str) -> tuple[list[int], list[int]]:
    """The rows and columns of a matrix that are looked at, in ascending order."""
    generator = random.Random(f"{seed}/{name}")
    rows = sorted(generator.sample(range(shape[0]), min(shape[0], SIDE)))
    width = min(shape[1], _WINDOW)
    return rows, sorted(generator.sample(range(width), min(width, SIDE)))


def spectrum_of(task: TensorTask, lane: WorkerContext, seed: int) -> Spectrum:
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
        loaded = lane.load(task.operands, start, start + width, base=True, deltas=True)
        for delta, values in zip(deltas, loaded.operands, strict=True):
            delta[i] = to_numpy(values)[columns]
    found = [_ranks(delta) for delta in deltas]
    return Spectrum(
        task.name,
        kind_of(task.name),
        tuple(task.shape),
        len(rows),
        len(columns),
        tuple(effective for effective, _, _ in found),
        tuple(stable for _, stable, _ in found),
        tuple(rank for _, _, rank in found),
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
    return _rounded(effective_rank(values)), _rounded(squares.sum() / squares[0]), rank


def effective_rank(singular: Any) -> float:
    """exp of the entropy of the normalised singular values (not all of them 0)."""
    import numpy as np

    shares = singular / singular.sum()
    shares = shares[shares > 0]
    return float(math.exp(-(shares * np.log(shares)).sum()))


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
