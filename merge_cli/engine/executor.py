"""Run the plan's method over a tensor: prepared once, then block by block into the output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any, cast

from merge_cli.checkpoint.dtypes import width_of
from merge_cli.engine.finite import check_finite, refuse_infinity
from merge_cli.engine.formula import TensorFormula
from merge_cli.engine.merge_stats import CountKept, StatisticsMeter, TensorStats
from merge_cli.engine.operands import BlockReader, ModelReader, TensorReader, operands_of
from merge_cli.engine.streaming import Finished, StreamedChunk, StreamedMerger
from merge_cli.engine.tensor_writers import OutputOffsets, TensorWriter, writer_for
from merge_cli.engine.worker_context import HostWorker
from merge_cli.kernels.fused import FusedForm, Ranks
from merge_cli.kernels.fused import merge as merge_stored
from merge_cli.kernels.quantise import largest_magnitude
from merge_cli.planning.chunks import Chunk
from merge_cli.planning.plan import Plan, TensorTask

_COPY = FusedForm([1.0])  # a tensor by itself, in one loop from its dtype to another


class MergeExecutor:
    """Runs the plan's method; its methods are called by the pool's threads.

    Args:
        offsets: tensor name -> the file it is written to, and the byte where it begins.

    Attributes:
        model_pass: what the method has learned of the whole model; None before it has.
    """

    def __init__(
        self,
        plan: Plan,
        reader: BlockReader,
        offsets: OutputOffsets,
        *,
        statistics: bool,
        allow_non_finite: bool,
    ) -> None:
        self._plan, self._reader, self._offsets = plan, reader, offsets
        self._statistics, self._allow = statistics, allow_non_finite
        self._method = plan.method
        self._streams = StreamedMerger(reader, offsets, statistics=statistics)
        self.model_pass: Any = None

    def run_model_pass(self, on_read: Callable[[], None]) -> None:
        """Let the method read the whole model first, if it does.

        Args:
            on_read: called once, when it does begin to read.
        """
        merged = [
            task
            for task in self._plan.tasks
            if task.action == "merge" and task.size and not task.copy_of
        ]
        if self._method.model_pass is not None and merged:
            readers = [self.formula(task, keeps_block=False).reader for task in merged]
            self.model_pass = self._method.model_pass(
                ModelReader(readers, self._reader.pool.map, cache(on_read))
            )

    @property
    def has_model_pass(self) -> bool:
        """Whether the method has looked at the whole model."""
        return self.model_pass is not None

    def merge(self, task: TensorTask, chunks: Sequence[Chunk], finished: Finished) -> None:
        """Merge these chunks of one tensor.

        Args:
            finished: called when a chunk's bytes are written.

        Raises:
            NonFiniteError: NaN or Inf in a source, unless they are allowed.
        """
        if task.moved or not task.size:
            self._reader.pool.map(partial(self._copy, task, finished), chunks)
            return
        formula = self.formula(task)
        map_chunks = self._reader.pool.map
        if task.action == "copy":
            largest = self._largest(formula.reader, None)
            map_chunks(partial(self._round, formula.reader, largest, finished), chunks)
            return
        form = self._form(formula, chunks)
        if form is not None:
            map_chunks(partial(self._stream_chunk, formula, form, finished), chunks)
            return
        largest = self._largest(formula.reader, formula.arguments)
        map_chunks(partial(self._merge_chunk, formula, largest, finished), chunks)

    def merge_several(
        self, tensors: Sequence[tuple[TensorTask, Sequence[Chunk]]], finished: Finished
    ) -> None:
        """Merge these chunks of small tensors, as many as possible in one call of a loop.

        Args:
            finished: called for each chunk when its bytes are written.

        Raises:
            NonFiniteError: NaN or Inf in a source, unless they are allowed.
        """
        streamed: list[StreamedChunk] = []
        for task, chunks in tensors:
            formula = self.formula(task)
            form = self._unread_form(formula, chunks)
            if form is None:
                self.merge(task, chunks, finished)
            else:
                streamed += [self._streamed(formula, form, chunk) for chunk in chunks]
        self._streams.merge(streamed, finished)

    def prepare(self, reader: TensorReader, task: TensorTask) -> Any:
        """What the method must know of the whole tensor first."""
        assert self._method.tensor_pass is not None
        return self._method.tensor_pass(reader, self.model_pass, **task.parameters)

    def formula(self, task: TensorTask, *, keeps_block: bool = True) -> TensorFormula:
        """The task with what its formula needs."""
        return TensorFormula(
            self._plan, self._reader, task, self.model_pass, self.prepare, keeps_block=keeps_block
        )

    def _form(self, formula: TensorFormula, chunks: Sequence[Chunk]) -> FusedForm | None:
        """The formula as one loop, where there is one and it applies."""
        if not self._streams.applies(formula.task):
            return None
        return self._unread_form(formula, chunks) or formula.fused()

    def _unread_form(self, formula: TensorFormula, chunks: Sequence[Chunk]) -> FusedForm | None:
        """`_form` where the tensor need not be read first."""
        applies = self._reader.files.on_disk and self._streams.applies(formula.task)
        return formula.fused_unread(chunks) if applies else None

    def _copy(self, task: TensorTask, finished: Finished, chunk: Chunk) -> None:
        """The bytes of what is stored: of several tensors, as large a share of each."""
        if chunk.stop > chunk.start:
            clock = self._reader.pool.worker.clock
            for stored, output in zip(task.operands[0].stored, task.outputs, strict=True):
                path, offset = self._offsets[output.name]
                start, stop = (
                    stored.nbytes * end // task.size for end in (chunk.start, chunk.stop)
                )
                self._reader.files.copy(clock, stored, start, stop - start, path, offset + start)
        finished(chunk, TensorStats())

    def _largest(self, reader: TensorReader, given: dict[str, Any] | None) -> float | None:
        """The largest finite magnitude of the output, where its encoding must know it first.

        What is merged is merged twice for it, so that no tensor has to fit in memory. The largest
        of a few numbers is the same number, whatever their order.

        Args:
            given: what the method is given besides blocks; None for a copy.
        """
        task = reader.task
        if task.encoding is None or not task.encoding.whole:
            return None

        def largest_of(span: int) -> float:
            return max(
                (
                    largest_magnitude(self._reader.pool.worker.fetch(values))
                    for values in self._merged(reader, given, span)
                ),
                default=0.0,
            )

        spans = range(len(reader.starts) - 1)
        return max(self._reader.pool.map(largest_of, spans), default=0.0)

    def _merged(
        self, reader: TensorReader, given: dict[str, Any] | None, span: int
    ) -> Iterator[Any]:
        """The merged values of one span, block by block."""
        method = self._method
        for block in reader.span(span):
            if given is None:
                yield block.operands[0]
            else:
                yield method.function(**operands_of(block, method.supplied), **given)

    def _round(
        self, reader: TensorReader, largest: float | None, finished: Finished, chunk: Chunk
    ) -> None:
        """A copy of what is computed, or stored in another dtype."""
        worker = self._reader.pool.worker
        writer = writer_for(reader.task, worker, self._offsets, chunk.start, chunk.stop, largest)
        stats, task = TensorStats(), reader.task
        is_fused = self._streams.applies(task)
        for start, stop in reader.block_ranges(chunk.start, chunk.stop):
            if is_fused and self._merge_fused(_COPY, task, start, stop, None):
                stats.add(TensorStats(non_finite=[0]))
                continue
            block = reader.block(start, stop)
            check_finite(block, task, stats, allowed=self._allow)
            if not writer.put(block.operands[0], start):
                refuse_infinity(task, block, allowed=self._allow)
        finished(chunk, stats)

    def _merge_chunk(
        self, formula: TensorFormula, largest: float | None, finished: Finished, chunk: Chunk
    ) -> None:
        """The plain way: one operation after another, over each block."""
        reader, worker, stats = formula.reader, self._reader.pool.worker, TensorStats()
        writer = writer_for(formula.task, worker, self._offsets, chunk.start, chunk.stop, largest)
        meter = self._streams.meter(formula.task, self._count_kept(formula))
        reader.read_ahead(reader.starts.index(chunk.start) + 1)
        for start, stop in reader.block_ranges(chunk.start, chunk.stop):
            self._merge_block(formula, writer, meter, stats, start, stop)
        if meter is not None:
            stats.add(meter.result())
        finished(chunk, stats)

    def _merge_block(
        self,
        formula: TensorFormula,
        writer: TensorWriter,
        meter: StatisticsMeter | None,
        stats: TensorStats,
        start: int,
        stop: int,
    ) -> None:
        task, method = formula.task, self._method
        block = formula.reader.block(start, stop)
        check_finite(block, task, stats, allowed=self._allow)
        merged = method.function(**operands_of(block, method.supplied), **formula.arguments)
        if not writer.put(merged, start):
            refuse_infinity(task, block, allowed=self._allow)
        if meter is not None:
            meter.add(block, merged)

    def _count_kept(self, formula: TensorFormula) -> CountKept | None:
        return formula.count_kept if self._method.count_kept is not None else None

    def _stream_chunk(
        self, formula: TensorFormula, form: FusedForm, finished: Finished, chunk: Chunk
    ) -> None:
        """One loop over the whole chunk."""
        if chunk.stop < formula.task.size:
            starts = formula.reader.starts
            formula.reader.read_ahead(starts.index(chunk.start) + 1)
        self._streams.merge([self._streamed(formula, form, chunk)], finished)

    def _streamed(self, formula: TensorFormula, form: FusedForm, chunk: Chunk) -> StreamedChunk:
        merge_block = partial(self._merge_left_over, formula, form, chunk)
        kept = self._count_kept(formula)
        return StreamedChunk(formula.task, chunk, form, merge_block, kept)

    def _merge_left_over(
        self,
        formula: TensorFormula,
        form: FusedForm,
        chunk: Chunk,
        start: int,
        meter: StatisticsMeter | None,
        stats: TensorStats,
    ) -> int:
        """Merge the block at `start`, which the loop over the chunk has left over.

        Returns:
            where the block ends.
        """
        task, worker = formula.task, cast(HostWorker, self._reader.pool.worker)
        stop = min(start + worker.block, chunk.stop)
        if not isinstance(form.drop, Ranks) and self._merge_fused(form, task, start, stop, meter):
            stats.add(TensorStats(non_finite=[0] * len(task.operands)))
        else:
            writer = writer_for(task, worker, self._offsets, chunk.start, chunk.stop)
            self._merge_block(formula, writer, meter, stats, start, stop)
        return stop

    def _merge_fused(
        self,
        form: FusedForm,
        task: TensorTask,
        start: int,
        stop: int,
        meter: StatisticsMeter | None,
    ) -> bool:
        """Merge one block in one loop; False where the plain way has to look at it."""
        worker = cast(HostWorker, self._reader.pool.worker)
        stored, out = worker.load_stored(
            task.inputs, start, stop, base=task.base is not None, dtype=task.dtype
        )
        if not merge_stored(form, stored, task.dtype, out):
            return False
        path, offset = self._offsets[task.name]
        worker.write(out.data, path, offset + start * width_of(task.dtype))
        if meter is not None:
            meter.add_stored(form, stored)
        return True
