"""How a plan is cut into units of work: the same cuts on every machine.

A unit is a span of one tensor whose inputs together take about `UNIT_BYTES`. The cuts depend on the
plan alone, never on memory, threads or device, so that a journal written by one run can be
continued by any other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from merge_cli.checkpoint.header import DTYPES
from merge_cli.engine.plan import TensorTask
from merge_cli.kernels.reduce import BLOCK_MULTIPLE

UNIT_BYTES = 48 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Chunk:
    """Elements [start, stop) of the task at index `task`; `number` counts over the plan."""

    number: int
    task: int
    start: int
    stop: int


def cut_chunks(tasks: Sequence[TensorTask]) -> list[Chunk]:
    """Every element of every task, once, in order; an empty tensor is one empty unit."""
    units: list[Chunk] = []
    for index, task in enumerate(tasks):
        starts = span_starts(task)
        for start, stop in zip(starts, starts[1:] or [0], strict=False):
            units.append(Chunk(len(units), index, start, stop))
    return units


def span_starts(task: TensorTask) -> list[int]:
    """Where the units of a task begin, and at the end its size."""
    width = sum(DTYPES[ref.dtype][0] for ref in task.inputs)
    least = BLOCK_MULTIPLE
    if task.block is not None:  # a block's scale is one unit's
        least = math.lcm(least, task.block[0] * task.shape[-1])
    step = max(1, UNIT_BYTES // width // least) * least
    return [*range(0, task.size, step), task.size]
