"""Tensors through the method: prepared once, then block by block into the output's bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

from merge_cli.checkpoint.headers import DTYPES
from merge_cli.engine.merge_stats import StatisticsMeter, TensorStats
from merge_cli.engine.operands import BlockReader, ModelReader, TensorReader, operands_of
from merge_cli.engine.tensor_writers import Places, writer_for
from merge_cli.errors import NonFiniteError
from merge_cli.kernels.backend import is_finite
from merge_cli.methods.blocks import Block
from merge_cli.planning.plan import Chunk, Plan, TensorTask, span_starts
from merge_cli.planning.resolve import arguments

Finished = Callable[[Chunk, TensorStats], None]


class MergeExecutor:
    """Runs the plan's method; its methods are called by the pool's threads.

    Args:
        places: tensor name -> the file it is written to, and the byte where it begins.
    """

    def __init__(
        self,
        plan: Plan,
        reading: BlockReader,
        places: Places,
        *,
        statistics: bool,
        allow_non_finite: bool,
    ) -> None:
        self._plan, self._reading, self._places = plan, reading, places
        self._statistics, self._allow = statistics, allow_non_finite
        self._method = plan.method
        self._survey: Any = None

    def survey(self, on_read: Callable[[], None]) -> None:
        """Let the method look at the whole model first, if it wants to.

        Args:
            on_read: called once, when it does begin to read.
        """
        merged = [
            task
            for task in self._plan.tasks
            if task.action == "merge" and task.size and not task.copy_of
        ]
        if self._method.model_pass is not None and merged:
            readers = [self._reader(task) for task in merged]
            self._survey = self._method.model_pass(
                ModelReader(readers, self._reading.pool, cache(on_read))
            )

    @property
    def surveyed(self) -> bool:
        """Whether the method has looked at the whole model."""
        return self._survey is not None

    def merge(self, task: TensorTask, units: Sequence[Chunk], finished: Finished) -> None:
        """Merge these units of one tensor.

        Args:
            finished: called when a unit's bytes are written.

        Raises:
            NonFiniteError: NaN or Inf in a source, unless they are allowed.
        """
        if task.moved or not task.size:
            self._reading.pool.map(partial(self._copy, task, finished), units)
            return
        reader = self._reader(task)
        if task.action == "copy":
            self._reading.pool.map(partial(self._round, reader, finished), units)
            return
        supplied: dict[str, Any] = {}
        if "coefficients" in self._method.supplied and self._plan.coefficients is not None:
            supplied["coefficients"] = self._plan.coefficients.of(task.formula_name, task.shape)
        if reader.statistics is not None:
            supplied["statistics"] = reader.statistics
        if self._method.tensor_pass is not None:
            supplied["prepared"] = self.prepare(reader, task)
        work = partial(self._merge_unit, reader, supplied, finished)
        self._reading.pool.map(work, units)

    def prepare(self, reader: TensorReader, task: TensorTask) -> Any:
        """What the method must know of the whole tensor first."""
        assert self._method.tensor_pass is not None
        return self._method.tensor_pass(reader, self._survey, **task.parameters)

    def _reader(self, task: TensorTask) -> TensorReader:
        return TensorReader(task, self._reading, span_starts(task), self._plan.statistics_of(task))

    def _copy(self, task: TensorTask, finished: Finished, unit: Chunk) -> None:
        if unit.stop > unit.start:
            width = DTYPES[task.dtype][0]
            path, offset = self._places[task.name]
            start, size = unit.start * width, (unit.stop - unit.start) * width
            clock = self._reading.pool.lane.clock
            (stored,) = task.operands[0].stored  # the planner copies nothing else
            self._reading.files.copy(clock, stored, start, size, path, offset + start)
        finished(unit, TensorStats())

    def _round(self, reader: TensorReader, finished: Finished, unit: Chunk) -> None:
        """A copy of what is computed, or stored in another dtype."""
        sink = writer_for(reader.task, self._reading.pool.lane, self._places, unit.start, unit.stop)
        stats = TensorStats()
        for block in reader.range(unit.start, unit.stop):
            self._check_finite(block, reader.task, stats)
            if not sink.put(block.operands[0], block.at.start):
                self._refuse_infinity(block.operands[0], reader.task, block)
        finished(unit, stats)

    def _merge_unit(
        self, reader: TensorReader, supplied: dict[str, Any], finished: Finished, unit: Chunk
    ) -> None:
        task, method, lane = reader.task, self._method, self._reading.pool.lane
        sink = writer_for(task, lane, self._places, unit.start, unit.stop)
        named = arguments(method, task.parameters)
        named |= {name: value for name, value in supplied.items() if name in method.supplied}
        count_kept = method.count_kept and partial(
            method.count_kept, prepared=supplied.get("prepared"), parameters=task.parameters
        )
        stats = TensorStats()
        meter = StatisticsMeter(len(task.operands), count_kept) if self._statistics else None
        reader.read_ahead(reader.starts.index(unit.start) + 1)
        for block in reader.range(unit.start, unit.stop):
            self._check_finite(block, task, stats)
            merged = method.function(**operands_of(block, method.supplied), **named)
            if not sink.put(merged, block.at.start):
                self._refuse_infinity(merged, task, block)
            if meter is not None:
                meter.add(block, merged)
        if meter is not None:
            stats.add(meter.result())
        finished(unit, stats)

    def _check_finite(self, block: Block, task: TensorTask, stats: TensorStats) -> None:
        counts = [0] * len(block.operands)
        if not block.finite:
            counts = [_count_non_finite(operand) for operand in block.operands]
            if not self._allow:
                raise self._non_finite_error(block, task, counts)
        stats.add(TensorStats(non_finite=counts))

    def _refuse_infinity(self, merged: Any, task: TensorTask, block: Block) -> None:
        """float16 ends at 65504: what is larger would be written as Inf."""
        if block.finite and not self._allow:
            message = "some merged weights are too large for float16"
            hint = "Use bfloat16 or float32 as dtype, or accept Inf with --allow-non-finite."
            raise NonFiniteError(message, tensor=task.name, hint=hint)

    def _non_finite_error(
        self, block: Block, task: TensorTask, counts: list[int]
    ) -> NonFiniteError:
        in_base = block.base is not None and _count_non_finite(block.base) > 0
        if in_base and task.base is not None:
            ref, values = task.base, block.base
        else:
            bad = next(i for i, count in enumerate(counts) if count)
            ref, values = task.operands[bad], block.operands[bad]
        place = _first_non_finite(values) + block.at.start
        message = f"NaN or Inf among its weights (first at element {place})"
        return NonFiniteError(
            message,
            model=ref.model,
            file=ref.stored[0].path.name,
            tensor=ref.name,
            hint="Replace the file, or accept it with --allow-non-finite.",
        )


def _count_non_finite(values: Any) -> int:
    return int((~is_finite(values)).sum())


def _first_non_finite(values: Any) -> int:
    return int((~is_finite(values)).nonzero()[0][0])  # torch's argmax refuses booleans
