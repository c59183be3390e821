"""The main loop: the plan's tensors over the pool's threads, from a journal's state to the end.

    tensors, largest first ──▶ workers: read ─▶ compute ─▶ write, block by block ──▶ journal

Every thread does all three, on blocks that fit in its cache. Small tensors are taken, recorded and
counted many at a time: a mixture of experts has tens of thousands. The system's read-ahead and
write-back are what overlaps with computing. On a GPU several workers share a device, each with a
stream of its own.
"""

from __future__ import annotations

import os
import queue
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_cli.engine.device import Device
from merge_cli.engine.executor import MergeExecutor
from merge_cli.engine.files import Files
from merge_cli.engine.journal import Journal
from merge_cli.engine.memory import keep_freed_memory, worker_memory
from merge_cli.engine.merge_stats import MergeStats, TensorStats, stages
from merge_cli.engine.operands import BlockReader, ask_for
from merge_cli.engine.pool import (
    Pool,
    arithmetic_for,
    memory_errors,
    one_torch_thread,
    worker_factory,
)
from merge_cli.engine.sweep import SweepExecutor
from merge_cli.engine.tensor_writers import output_offsets
from merge_cli.errors import NonFiniteError
from merge_cli.options import MergeOptions, OnProgress, Progress
from merge_cli.planning.chunks import Chunk, cut_chunks
from merge_cli.planning.plan import Plan
from merge_cli.system.machine import usable_cores
from merge_cli.system.raw_io import FilePool, sync, write_error

_SYNC_BYTES = 2_000_000_000
_MODEL_PASS = "reading the whole model first, for thresholds over all of it"
# Of the inputs of small tensors that a thread takes at once. Fewer where there are many threads:
# each should come back for more so many times, or some have nothing to do at the end.
_BATCH_BYTES, _TURNS = 128 * 2**20, 16
Merged = Sequence[tuple[Chunk, TensorStats]]
Done = queue.SimpleQueue["Merged | BaseException | None"]


@dataclass(frozen=True)
class Share:
    """A part of a merge: what one node of a cluster does of it.

    Attributes:
        numbers: of its chunks. Without any, the method's pass over the whole model is made alone.
        model_pass: what that pass has returned; None where it has not been made.
    """

    numbers: frozenset[int]
    model_pass: Any = None


def run_loop(
    plan: Plan,
    model: Path,
    journal: Journal,
    device: Device,
    options: MergeOptions,
    on_progress: OnProgress,
    share: Share | None = None,
) -> MergeStats:
    """Merge every chunk that the journal does not have yet.

    Args:
        model: the folder with the allocated shards.
        share: what to merge of them; None: all.

    Raises:
        SourceError: a source vanished, is truncated, or holds NaN or Inf.
        ResourceError: disk or memory ran out.
        KeyboardInterrupt: as it comes, after every thread has ended.
    """
    chunks = cut_chunks(plan.tasks)
    tally = Tally(plan, chunks, journal, model, options, on_progress)
    remaining: dict[int, list[Chunk]] = {}
    for chunk in chunks:
        if chunk.number not in journal.done and (share is None or chunk.number in share.numbers):
            remaining.setdefault(chunk.task, []).append(chunk)
    # The largest first, so that no thread is left alone with one at the end.
    order = sorted(remaining, key=lambda task: (-plan.tasks[task].bytes_read, task))
    finished: Done = queue.SimpleQueue()

    files = Files(FilePool(os.O_RDONLY), FilePool(os.O_RDWR))
    for chunk in (remaining[task][0] for task in order[: options.threads or usable_cores()]):
        if chunk.stop > chunk.start:  # the disk works while libraries are loaded
            ask_for(files, plan.tasks[chunk.task], chunk.start, chunk.stop)
    arithmetic, why = arithmetic_for(plan, device)
    room = worker_memory(plan, device, options)
    pool = Pool(worker_factory(files, device, arithmetic, room), room.workers)
    reader = BlockReader(pool, files, plan.recipe.seed, "deltas" in plan.method.supplied)
    executor = _executor(plan, reader, model, options)

    def work(batch: Sequence[int]) -> None:
        if len(batch) == 1:  # perhaps a large one: its chunks are recorded as they come
            executor.merge(plan.tasks[batch[0]], remaining[batch[0]], record_one)
            return
        merged: list[tuple[Chunk, TensorStats]] = []
        tensors = [(plan.tasks[task], remaining[task]) for task in batch]
        executor.merge_several(tensors, lambda *chunk: merged.append(chunk))
        record(merged)

    def record_one(chunk: Chunk, chunk_stats: TensorStats) -> None:
        record([(chunk, chunk_stats)])

    def record(merged: Merged) -> None:
        journal.record((chunk.number, chunk_stats) for chunk, chunk_stats in merged)
        finished.put(merged)

    keep_freed_memory()
    began = time.perf_counter()
    try:
        with one_torch_thread(device, arithmetic), memory_errors(), pool:
            if share is not None and share.model_pass is not None:
                executor.model_pass = share.model_pass
            elif (remaining or share is not None) and plan.method.model_pass is not None:
                _run_model_pass(executor, pool, on_progress)
            model_pass_ended = time.perf_counter()
            tally.report("resumed" if tally.resumed else "")
            pool.start(work, task_batches(plan, order, room.workers), finished)
            while (message := finished.get()) is not None:
                if isinstance(message, BaseException):
                    raise message
                tally.add(message)
    finally:
        files.sources.close()
        files.shards.close()
    ended = time.perf_counter()
    return MergeStats(
        key=journal.key,
        device=device,
        arithmetic=f"{arithmetic}: {why}" if why else arithmetic,
        threads=room.workers,
        buffers=room.workers * room.bytes,
        stages=stages(pool.workers, room.workers, ended - began),
        stats=tally.stats,
        resumed=tally.resumed,
        seconds=ended - model_pass_ended,
        survey_seconds=model_pass_ended - began if plan.method.model_pass is not None else 0.0,
        model_pass=executor.model_pass,
    )


class Tally:
    """What is merged so far: statistics by task, and bytes, which are reported as they come.

    The calling thread alone counts; the pool's threads only put chunks into a queue.
    """

    def __init__(
        self,
        plan: Plan,
        chunks: list[Chunk],
        journal: Journal,
        model: Path,
        options: MergeOptions,
        on_progress: OnProgress,
    ) -> None:
        self._plan, self._journal, self._model = plan, journal, model
        self._on_progress, self._syncs = on_progress, options.fsync
        self.stats = _earlier_stats(plan, chunks, journal, options)
        self._total = sum(output_bytes(plan, chunk) for chunk in chunks)
        self.resumed = sum(output_bytes(plan, chunks[number]) for number in journal.done)
        self._done, self._unsynced = self.resumed, 0

    def add(self, merged: Merged) -> None:
        """Count chunks whose bytes are written."""
        for chunk, chunk_stats in merged:
            size = output_bytes(self._plan, chunk)
            self._done += size
            self._unsynced += size
            self.stats[chunk.task].add(chunk_stats)
        if self._syncs and self._unsynced > _SYNC_BYTES:
            _sync_chunks(self._journal, self._model, self._plan)
            self._unsynced = 0
        self.report()

    def report(self, note: str = "") -> None:
        self._on_progress(Progress("merge", self._done, self._total, note))


def task_batches(plan: Plan, order: Sequence[int], threads: int) -> list[list[int]]:
    """Tasks in this order, in runs that a thread takes at once: one each where they are large."""
    sizes = [plan.tasks[task].bytes_read for task in order]
    limit = min(_BATCH_BYTES, sum(sizes) // (threads * _TURNS))
    batches: list[list[int]] = []
    room = 0
    for task, size in zip(order, sizes, strict=True):
        if size > room:
            batches.append([])
            room = limit
        batches[-1].append(task)
        room -= size
    return batches


def _executor(
    plan: Plan, reader: BlockReader, model: Path, options: MergeOptions
) -> MergeExecutor | SweepExecutor:
    if plan.variants:
        return SweepExecutor(plan, reader, model, allow_non_finite=options.allow_non_finite)
    return MergeExecutor(
        plan,
        reader,
        output_offsets(plan, model),
        statistics=options.statistics,
        allow_non_finite=options.allow_non_finite,
    )


def _run_model_pass(
    executor: MergeExecutor | SweepExecutor, pool: Pool, on_progress: OnProgress
) -> None:
    """By one of the pool's threads, which has buffers; progress is reported in this one."""
    messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
    pool.start(
        lambda _: executor.run_model_pass(lambda: messages.put(_MODEL_PASS)), [None], messages
    )
    while (message := messages.get()) is not None:
        if isinstance(message, BaseException):
            raise message
        on_progress(Progress("survey", 0, 0, message))


def _earlier_stats(
    plan: Plan, chunks: list[Chunk], journal: Journal, options: MergeOptions
) -> list[TensorStats]:
    """What an interrupted run has measured, by task."""
    stats = [TensorStats() for _ in plan.tasks]
    for number, earlier in journal.done.items():
        task = plan.tasks[chunks[number].task]
        if any(earlier.non_finite) and not options.allow_non_finite:
            message = "an interrupted run merged NaN or Inf, which was allowed then"
            hint = "Allow it again with --allow-non-finite, or start over with --fresh."
            raise NonFiniteError(message, tensor=task.name, hint=hint)
        stats[chunks[number].task].add(earlier)
    return stats


def _sync_chunks(journal: Journal, model: Path, plan: Plan) -> None:
    # Counted before the wait: what is written meanwhile may not be covered by it.
    count = journal.count
    try:
        sync([*(model / shard.file for shard in plan.shards), model, model.parent])
    except OSError as error:
        raise write_error(error, model) from error
    journal.synced(count)


def output_bytes(plan: Plan, chunk: Chunk) -> int:
    """What is written for a chunk, of all variants together."""
    task = plan.tasks[chunk.task]
    size, written = max(1, task.size), task.bytes_written
    share = written * chunk.stop // size - written * chunk.start // size
    return share * max(1, len(plan.variants))
