"""How a plan is cut into units of work: the same cuts on every machine.

A unit is a span of one tensor whose inputs together take about `UNIT_BYTES`. The cuts depend on the
plan alone, never on memory, threads or device, so that a journal written by one run can be
continued by any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from merge_cli.checkpoint.header import DTYPES
from merge_cli.engine.plan import TensorTask
from merge_cli.kernels.reduce import BLOCK_MULTIPLE

UNIT_BYTES = 48 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Unit:
    """Elements [start, stop) of the task at index `task`; `number` counts over the plan."""

    number: int
    task: int
    start: int
    stop: int

    def cost(self, task: TensorTask) -> int:
        """Bytes held while it is worked on: its inputs and its output."""
        length = self.stop - self.start
        width = sum(DTYPES[ref.dtype][0] for ref in task.inputs) + DTYPES[task.dtype][0]
        return length * width


def cut_units(tasks: Sequence[TensorTask]) -> list[Unit]:
    """Every element of every task, once, in order."""
    units: list[Unit] = []
    for index, task in enumerate(tasks):
        step = _unit_length(task)
        for start in range(0, max(task.size, 1), step):
            units.append(Unit(len(units), index, start, min(start + step, task.size)))
    return units


def _unit_length(task: TensorTask) -> int:
    width = sum(DTYPES[ref.dtype][0] for ref in task.inputs)
    return max(1, UNIT_BYTES // width // BLOCK_MULTIPLE) * BLOCK_MULTIPLE
