"""One tensor and its formula: what the method is given besides blocks, found when it is needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from merge_cli.engine.operands import BlockReader, TensorReader
from merge_cli.kernels.fused import FusedForm
from merge_cli.methods.blocks import Block, Span
from merge_cli.planning.chunks import Chunk, span_starts
from merge_cli.planning.plan import Plan, TensorTask
from merge_cli.planning.resolve import arguments


class TensorFormula:
    """A task of a plan, for one thread or for several that share its chunks.

    Args:
        model_pass: what the method has learned of the whole model.
        prepare: the method's `tensor_pass`.
        keeps_block: see `TensorReader`; for a method with a `tensor_pass`.
    """

    def __init__(
        self,
        plan: Plan,
        reading: BlockReader,
        task: TensorTask,
        model_pass: Any,
        prepare: Callable[[TensorReader, TensorTask], Any],
        *,
        keeps_block: bool = True,
    ) -> None:
        self._plan, self._reading, self._model_pass = plan, reading, model_pass
        self._method, self.task, self._prepare = plan.method, task, prepare
        self._keeps_block = keeps_block and plan.method.tensor_pass is not None

    @cached_property
    def reader(self) -> TensorReader:
        task = self.task
        statistics = self._plan.statistics_of(task)
        starts = span_starts(task)
        return TensorReader(task, self._reading, starts, statistics, keeps_block=self._keeps_block)

    @cached_property
    def supplied(self) -> dict[str, Any]:
        """Besides blocks and parameters; reads the tensor where the method has to know it first."""
        task, method, supplied = self.task, self._method, dict[str, Any]()
        if "coefficients" in method.supplied and self._plan.coefficients is not None:
            supplied["coefficients"] = self._plan.coefficients.of(task.formula_name, task.shape)
        if self.reader.statistics is not None:
            supplied["statistics"] = self.reader.statistics
        if method.tensor_pass is not None:
            supplied["prepared"] = self._prepare(self.reader, task)
        return supplied

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """All keywords of the method's function but its operands."""
        method = self._method
        supplied = {name: v for name, v in self.supplied.items() if name in method.supplied}
        return arguments(method, self.task.parameters) | supplied

    def count_kept(self, block: Block) -> list[int]:
        """The method's capability of that name."""
        count = self._method.count_kept
        assert count is not None
        prepared = self.supplied.get("prepared")
        return count(block, prepared=prepared, parameters=self.task.parameters)

    def fused(self) -> FusedForm | None:
        """The formula as one loop over stored bytes, where the method has one."""
        method, reader = self._method, self.reader
        if method.fused is None:
            return None
        prepared, parameters = (
            self.supplied.get("prepared"),
            arguments(method, self.task.parameters),
        )
        # A block that was read for that is not read again.
        return None if reader.has_block else method.fused(reader.at, prepared, **parameters)

    def fused_unread(self, chunks: Sequence[Chunk]) -> FusedForm | None:
        """The same without reading the tensor, where nothing must be known of it first.

        Args:
            chunks: those that are merged.
        """
        method, task = self._method, self.task
        if method.fused is None or task.action != "merge" or not task.size:
            return None
        parameters = arguments(method, task.parameters)
        at = Span(task.formula_name, 0, self._reading.seed, task.ids)
        if method.tensor_pass is None:
            return method.fused(at, None, **parameters)
        if method.fused_unread is None:
            return None
        (first, *others), block = chunks, self._reading.pool.worker.block
        is_whole = not others and first.stop - first.start == task.size <= block
        size = task.size if is_whole else None
        return method.fused_unread(at, size, self._model_pass, **parameters)
