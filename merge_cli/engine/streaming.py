"""Merge chunks by loops that read and write by themselves: see `kernels.streams`.

    chunks, or many small tensors ──▶ one call: read ─▶ merge ─▶ write ─▶ measure, block by block

A block that a loop leaves over is merged in the plain way, and the loop goes on behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import cast

from merge_cli.engine.merge_stats import (
    CountKept,
    SampleRuns,
    StatisticsMeter,
    TensorStats,
    measures_pairs,
)
from merge_cli.engine.operands import BlockReader
from merge_cli.engine.tensor_writers import OutputOffsets
from merge_cli.engine.worker_context import HostWorker
from merge_cli.kernels.fused import FORMATS, FusedForm, StoredSums
from merge_cli.kernels.streams import MergeJob, MergeStreams
from merge_cli.planning.chunks import Chunk
from merge_cli.planning.plan import TensorTask

Finished = Callable[[Chunk, TensorStats], None]
# Merges the block of a chunk that begins at an element, measures it, and returns where it ends.
MergeBlock = Callable[[int, StatisticsMeter | None, TensorStats], int]


@dataclass(frozen=True)
class StreamedChunk:
    """A chunk, and its tensor's formula as a loop computes it.

    Attributes:
        merge_block: merges a block in another way.
        count_kept: counts what that way keeps; None where nothing is dropped.
    """

    task: TensorTask
    chunk: Chunk
    form: FusedForm
    merge_block: MergeBlock
    count_kept: CountKept | None


class StreamedMerger:
    """Runs compiled loops over chunks; its methods are called by the pool's threads."""

    def __init__(self, reader: BlockReader, offsets: OutputOffsets, *, statistics: bool) -> None:
        self._reader, self._offsets, self._statistics = reader, offsets, statistics

    def applies(self, task: TensorTask) -> bool:
        """Whether a compiled loop can merge a tensor from stored bytes to stored bytes."""
        return (
            self._reader.pool.worker.fuses
            and task.encoding is None
            and task.dtype in FORMATS
            and all(tensor.dtype in FORMATS for tensor in task.inputs)
            and (task.base is None or self._reader.deltas)
        )

    def meter(
        self, task: TensorTask, count_kept: CountKept | None, sums: StoredSums | None = None
    ) -> StatisticsMeter | None:
        """What measures a chunk for the report, if anything does."""
        if not self._statistics:
            return None
        return StatisticsMeter(len(task.operands), task.size, count_kept, sums)

    def merge(self, chunks: Sequence[StreamedChunk], finished: Finished) -> None:
        """Merge chunks of tensors to which loops apply.

        Args:
            finished: called for each chunk when its bytes are written.
        """
        worker = cast(HostWorker, self._reader.pool.worker)
        streamed: list[tuple[StreamedChunk, MergeJob]] = []
        for item in chunks:
            job = self._job(item, worker, alone=len(chunks) == 1)
            if job is None:
                self._merge_by_blocks(item, finished)
            else:
                streamed.append((item, job))
        for _, alike in groupby(streamed, key=lambda pair: len(pair[1].inputs)):
            self._stream([*alike], worker, finished)

    def _job(self, item: StreamedChunk, worker: HostWorker, *, alone: bool) -> MergeJob | None:
        """The chunk as a loop takes it; None where some input is computed, or a file has gone."""
        task, chunk = item.task, item.chunk
        inputs = worker.stored_inputs(task.inputs)
        target = worker.stored_target(*self._offsets[task.name], task.dtype)
        if inputs is None or target is None:
            return None
        runs = SampleRuns.of(task.size) if self._statistics else SampleRuns(0, 0)
        where = inputs, target, chunk.start, chunk.stop
        # Others would overwrite what a pass over this one has left in the buffer.
        is_loaded = alone and worker.holds(inputs, chunk.start, chunk.stop)
        job = MergeJob(item.form, *where, runs.run, runs.period, is_loaded)
        return job if job.has_one_key else None

    def _stream(
        self,
        jobs: Sequence[tuple[StreamedChunk, MergeJob]],
        worker: HostWorker,
        finished: Finished,
    ) -> None:
        task = jobs[0][0].task
        pairs = measures_pairs(len(task.operands))
        streams = MergeStreams([job for _, job in jobs], based=task.base is not None, pairs=pairs)
        meters = [
            self.meter(item.task, item.count_kept, sums)
            for (item, _), sums in zip(jobs, streams.sums.each(), strict=True)
        ]
        stats = [TensorStats(non_finite=[0] * len(task.operands)) for _ in jobs]
        merged = [item.chunk.start for item, _ in jobs]  # up to here, and measured
        number = 0
        while (number := worker.run_streams(streams, number)) < len(jobs):
            begin, meter = streams.begin_of(number), meters[number]
            if meter is not None:
                meter.cover(merged[number], begin)
            end = jobs[number][0].merge_block(begin, meter, stats[number])
            streams.skip_to(number, end)
            merged[number] = end
        for (item, _), meter, chunk_stats, begin in zip(jobs, meters, stats, merged, strict=True):
            if meter is not None:
                meter.cover(begin, item.chunk.stop)
                chunk_stats.add(meter.result())
            finished(item.chunk, chunk_stats)

    def _merge_by_blocks(self, item: StreamedChunk, finished: Finished) -> None:
        stats, meter = TensorStats(), self.meter(item.task, item.count_kept)
        begin = item.chunk.start
        while begin < item.chunk.stop:
            begin = item.merge_block(begin, meter, stats)
        if meter is not None:
            stats.add(meter.result())
        finished(item.chunk, stats)
