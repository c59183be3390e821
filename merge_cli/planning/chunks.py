"""A plan cut into chunks: spans of one tensor whose inputs together take about `UNIT_BYTES`.

The cuts depend on the plan alone, never on memory, threads or device: a journal that one run has
begun can be continued by any other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from merge_cli.checkpoint.dtypes import width_of
from merge_cli.kernels.reduce import BLOCK_MULTIPLE
from merge_cli.planning.plan import TensorTask

UNIT_BYTES = 128 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Chunk:
    """Elements [start, stop) of the task at index `task`; `number` counts over the plan."""

    number: int
    task: int
    start: int
    stop: int


def cut_chunks(tasks: Sequence[TensorTask]) -> list[Chunk]:
    """Every element of every task, once, in order; an empty tensor is one empty chunk."""
    chunks: list[Chunk] = []
    for index, task in enumerate(tasks):
        starts = span_starts(task)
        for start, stop in zip(starts, starts[1:] or [0], strict=False):
            chunks.append(Chunk(len(chunks), index, start, stop))
    return chunks


def span_starts(task: TensorTask) -> list[int]:
    """Where the chunks of a task begin, and at the end its size."""
    width = sum(width_of(ref.dtype) for ref in task.inputs)
    least = BLOCK_MULTIPLE
    if task.encoding is not None and task.size:  # what shares a scale is in one chunk
        least = math.lcm(least, task.encoding.span(task.shape))
    step = max(1, UNIT_BYTES // width // least) * least
    return [*range(0, task.size, step), task.size]
