"""The variants of a sweep, merged from blocks that are read once.

for a chunk of the joint task:   read a block of every operand
                                 for each variant: its operands ─▶ method ─▶ its own file
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from merge_cli.engine.executor import MergeExecutor
from merge_cli.engine.finite import check_finite, refuse_infinity
from merge_cli.engine.merge_stats import TensorStats
from merge_cli.engine.operands import BlockReader, TensorReader, operands_of
from merge_cli.engine.streaming import Finished
from merge_cli.engine.tensor_writers import TensorWriter, output_offsets, writer_for
from merge_cli.methods.blocks import Block
from merge_cli.planning.chunks import Chunk, span_starts
from merge_cli.planning.plan import Plan, TensorTask
from merge_cli.planning.sweep import operand_key


class _Variant(MergeExecutor):
    """Merges one variant, also from blocks that others have read."""

    def settings(self, task: TensorTask) -> tuple[dict[str, Any], float | None]:
        """What the method gets beside its operands, and what the encoding must know first."""
        formula = self.formula(task, keeps_block=False)
        return formula.arguments, self._largest(formula.reader, formula.arguments)

    def merge_block(
        self, task: TensorTask, block: Block, arguments: dict[str, Any], writer: TensorWriter
    ) -> None:
        merged = self._method.function(**operands_of(block, self._method.supplied), **arguments)
        if not writer.put(merged, block.at.start):
            refuse_infinity(task, block, allowed=self._allow)

    def check(self, block: Block, task: TensorTask, stats: TensorStats) -> None:
        check_finite(block, task, stats, allowed=self._allow)

    def writer(self, task: TensorTask, chunk: Chunk, largest: float | None) -> TensorWriter:
        worker = self._reader.pool.worker
        return writer_for(task, worker, self._offsets, chunk.start, chunk.stop, largest)


@dataclass(frozen=True)
class _Formula:
    """One variant's tensor.

    Attributes:
        picks: its operands among those of the joint task.
        largest: of its output, where the encoding must know it first.
    """

    variant: _Variant
    task: TensorTask
    picks: tuple[int, ...]
    arguments: dict[str, Any]
    largest: float | None

    def of(self, block: Block) -> Block:
        """The block as the variant sees it."""
        operands = [block.operands[i] for i in self.picks]
        return replace(block, operands=operands, at=replace(block.at, sources=self.task.ids))


class SweepExecutor:
    """`MergeExecutor`, for the joint plan of a sweep.

    A report's statistics are not measured: they would be the same pairs of sources again and again.

    Args:
        model: the folder of the variants' folders.
    """

    def __init__(
        self, plan: Plan, reader: BlockReader, model: Path, *, allow_non_finite: bool
    ) -> None:
        self._plan, self._reader = plan, reader
        self._variants = [
            _Variant(
                variant,
                reader,
                output_offsets(variant, model / name),
                statistics=False,
                allow_non_finite=allow_non_finite,
            )
            for name, variant in plan.variants.items()
        ]

    @property
    def model_pass(self) -> list[Any] | None:
        """What the method has learned of the whole model, for each variant; None for nothing."""
        learned = [variant.model_pass for variant in self._variants]
        return learned if any(item is not None for item in learned) else None

    @model_pass.setter
    def model_pass(self, learned: Sequence[Any]) -> None:
        for variant, model_pass in zip(self._variants, learned, strict=True):
            variant.model_pass = model_pass

    def run_model_pass(self, on_read: Callable[[], None]) -> None:
        """As a MergeExecutor does, for one variant after the other."""
        for variant in self._variants:
            variant.run_model_pass(on_read)

    def merge(self, task: TensorTask, chunks: Sequence[Chunk], finished: Finished) -> None:
        """Merge these chunks of one tensor of every variant.

        Raises:
            as `MergeExecutor.merge` does.
        """
        number = chunks[0].task
        keys = [operand_key(operand) for operand in task.operands]
        formulas = []
        for variant, plan in zip(self._variants, self._plan.variants.values(), strict=True):
            its_task = plan.tasks[number]
            if its_task.action == "copy" or not its_task.size:
                variant.merge(its_task, chunks, lambda chunk, stats: None)
                continue
            picks = tuple(keys.index(operand_key(operand)) for operand in its_task.operands)
            settings, largest = variant.settings(its_task)
            formulas.append(_Formula(variant, its_task, picks, settings, largest))
        reader = TensorReader(task, self._reader, span_starts(task))
        work = partial(self._merge_chunk, reader, formulas, finished)
        self._reader.pool.map(work, chunks)

    def merge_several(
        self, tensors: Sequence[tuple[TensorTask, Sequence[Chunk]]], finished: Finished
    ) -> None:
        """`merge` of several tensors."""
        for task, chunks in tensors:
            self.merge(task, chunks, finished)

    def _merge_chunk(
        self, reader: TensorReader, formulas: Sequence[_Formula], finished: Finished, chunk: Chunk
    ) -> None:
        stats = TensorStats()
        writers = [item.variant.writer(item.task, chunk, item.largest) for item in formulas]
        if formulas:
            reader.read_ahead(reader.starts.index(chunk.start) + 1)
            for block in reader.range(chunk.start, chunk.stop):
                formulas[0].variant.check(block, reader.task, stats)
                for formula, writer in zip(formulas, writers, strict=True):
                    formula.variant.merge_block(
                        formula.task, formula.of(block), formula.arguments, writer
                    )
        finished(chunk, stats)
