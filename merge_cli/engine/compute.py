"""One unit of work: blocks through the method, rounded once into the output's bytes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from merge_cli.checkpoint.header import DTYPES
from merge_cli.checkpoint.raw import FilePool
from merge_cli.engine.operands import Arithmetic, TaskReader
from merge_cli.engine.plan import Plan, TensorTask
from merge_cli.engine.statistics import TensorStats, measure
from merge_cli.engine.units import Unit
from merge_cli.errors import NonFiniteError
from merge_cli.methods.blocks import Block
from merge_cli.methods.resolve import arguments

if TYPE_CHECKING:
    from torch import Tensor


class Computer:
    """Runs the plan's method over units, from any number of threads.

    What `prepare` finds for a tensor of several units is computed once and shared; such a tensor
    is read again for it, in blocks, so that it never has to be in memory whole.
    """

    def __init__(
        self, plan: Plan, arithmetic: Arithmetic, files: FilePool, *, statistics: bool
    ) -> None:
        self._plan, self._arithmetic, self._files = plan, arithmetic, files
        self._statistics = statistics
        self._method = plan.method
        self._survey: Any = None
        self._prepared: dict[int, Any] = {}
        self._locks: dict[int, threading.Lock] = {}
        self._guard = threading.Lock()

    def survey(self, on_read: Callable[[], None]) -> None:
        """Let the method look at the whole model first, if it wants to.

        Args:
            on_read: called once, when it does begin to read.
        """
        merged = [task for task in self._plan.tasks if task.action == "merge" and task.size]
        if self._method.survey is not None and merged:
            once = cache(on_read)
            readers = [
                TaskReader(task, self._arithmetic, self._files, on_pass=once) for task in merged
            ]
            self._survey = self._method.survey(readers)

    def run(self, unit: Unit, loaded: list[Tensor]) -> tuple[Tensor, TensorStats]:
        """Merge one unit.

        Args:
            loaded: raw bytes of every input of the task for the unit's span, the base first.

        Returns:
            the output's raw bytes and the unit's statistics.

        Raises:
            NonFiniteError: NaN or Inf in a source, unless they are allowed.
        """
        import torch

        task = self._plan.tasks[unit.task]
        stats = TensorStats()
        if task.action == "copy":
            return loaded[0], stats
        reader = TaskReader(task, self._arithmetic, self._files, unit.start, unit.stop, loaded)
        dtype = getattr(torch, DTYPES[task.dtype][1])
        output = torch.empty(unit.stop - unit.start, dtype=dtype)
        supplied: dict[str, Any] = {}
        if "prepared" in self._method.supplied:
            supplied["prepared"] = self._prepare(unit, task, reader)
        supplied |= arguments(self._method, task.parameters)
        kept = None
        if self._method.kept is not None:
            kept = partial(
                self._method.kept,
                prepared=supplied.get("prepared"),
                parameters=task.parameters,
            )
        for block in reader.blocks():
            self._check_finite(block, task, stats)
            merged = self._method.function(**self._operands(block), **supplied)
            start = block.at.start - unit.start
            rounded = output[start : start + merged.numel()]
            rounded.copy_(merged)
            if dtype == torch.float16:
                self._check_range(rounded, task, stats)
            if self._statistics:
                measure(stats, block, merged, kept)
        return output.view(torch.uint8), stats

    def _operands(self, block: Block) -> dict[str, Any]:
        offered = {
            "base": block.base, "models": block.operands, "deltas": block.operands, "at": block.at,
        }  # fmt: skip
        return {name: value for name, value in offered.items() if name in self._method.supplied}

    def _prepare(self, unit: Unit, task: TensorTask, reader: TaskReader) -> Any:
        prepare = self._method.prepare
        if prepare is None:
            return None
        if unit.stop - unit.start == task.size:
            return prepare(reader, self._survey, **task.parameters)
        with self._guard:
            lock = self._locks.setdefault(unit.task, threading.Lock())
        with lock:
            if unit.task not in self._prepared:
                whole = TaskReader(task, self._arithmetic, self._files)
                self._prepared[unit.task] = prepare(whole, self._survey, **task.parameters)
            return self._prepared[unit.task]

    def _check_finite(self, block: Block, task: TensorTask, stats: TensorStats) -> None:
        counts = []
        for operand in block.operands:
            # A sum of squares is finite only if every element is, and costs one quick pass; it can
            # also overflow, so that only the count decides.
            if operand.dot(operand).isfinite():
                counts.append(0)
            else:
                counts.append(int((~operand.isfinite()).sum()))
        stats.add(TensorStats(non_finite=counts))
        if any(counts) and not self._arithmetic.allow_non_finite:
            raise self._non_finite_error(block, task, counts)

    def _check_range(self, rounded: Tensor, task: TensorTask, stats: TensorStats) -> None:
        """float16 ends at 65504: what is larger would be written as Inf."""
        infinite = int((~rounded.isfinite()).sum())
        if infinite and not self._arithmetic.allow_non_finite and not any(stats.non_finite):
            what = f"{infinite} merged weights are too large for float16"
            hint = "Use bfloat16 or float32 as dtype, or accept Inf with --allow-non-finite."
            raise NonFiniteError(what, tensor=task.name, hint=hint)

    def _non_finite_error(
        self, block: Block, task: TensorTask, counts: list[int]
    ) -> NonFiniteError:
        bad = next(i for i, count in enumerate(counts) if count)
        in_base = block.base is not None and not bool(block.base.isfinite().all())
        ref = task.base if in_base and task.base else task.operands[bad]
        values = block.base if in_base and block.base is not None else block.operands[bad]
        place = int((~values.isfinite()).nonzero()[0]) + block.at.start
        what = f"NaN or Inf among its weights (first at element {place})"
        return NonFiniteError(
            what,
            model=ref.model,
            file=ref.path.name,
            tensor=ref.name,
            hint="Replace the file, or accept it with --allow-non-finite.",
        )
