"""Write merged values: rounded block by block, or in fp8 by rows of blocks with their scales."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from merge_cli.checkpoint.dtypes import width_of
from merge_cli.engine.worker_context import WorkerContext
from merge_cli.formats.fp8 import FP8
from merge_cli.planning.plan import Plan, TensorTask

# An output tensor -> the file that it is written to, and the byte where it begins.
OutputOffsets = Mapping[str, tuple[Path, int]]


def output_offsets(plan: Plan, model: Path) -> OutputOffsets:
    """Where each output tensor lies in the shards, which are allocated already."""
    return {
        name: (model / shard.file, offset)
        for shard in plan.shards
        for name, offset in shard.offsets.items()
    }


class TensorWriter(Protocol):
    """Takes one chunk's values, in order."""

    def put(self, values: Any, start: int) -> bool:
        """Values of a span that begins at `start`; whether a float16 can hold them."""


def writer_for(
    task: TensorTask, worker: WorkerContext, offsets: OutputOffsets, start: int, stop: int
) -> TensorWriter:
    """For elements [start, stop) of a task's output."""
    if task.block is None:
        return _RoundingWriter(task, worker, offsets)
    return _ScaledWriter(task, task.block, worker, offsets, start, stop)


class _RoundingWriter:
    def __init__(self, task: TensorTask, worker: WorkerContext, offsets: OutputOffsets) -> None:
        self._dtype, self._worker = task.dtype, worker
        self._path, self._offset = offsets[task.name]

    def put(self, values: Any, start: int) -> bool:
        position = self._offset + start * width_of(self._dtype)
        return self._worker.store(values, self._dtype, self._path, position)


class _ScaledWriter:
    """Waits for whole rows of blocks, since a scale is known when its block is."""

    def __init__(
        self,
        task: TensorTask,
        block: tuple[int, int],
        worker: WorkerContext,
        offsets: OutputOffsets,
        start: int,
        stop: int,
    ) -> None:
        import numpy as np

        assert task.scales is not None
        self._columns, self._wide, self._worker = task.shape[-1], block[1], worker
        self._codes, self._scales = offsets[task.name], offsets[task.scales.name]
        self._across = task.scales.shape[-1]
        self._row = block[0] * self._columns
        self._stop = stop
        self._waiting = np.empty(min(self._row, stop - start), np.float32)
        self._filled = 0

    def put(self, values: Any, start: int) -> bool:
        # Blocks are cut for the cache and end in the middle of a row of fp8 blocks. Their scale is
        # the largest magnitude of the whole fp8 block, so rows wait until it is complete. A chunk
        # always begins and ends with one (`plan.span_starts`): nothing waits for another thread.
        arrived = self._worker.fetch(values)
        taken = 0
        while taken < len(arrived):
            begin = start + taken - self._filled  # of the row of blocks that is being filled
            size = min(self._row, self._stop - begin)
            count = min(size - self._filled, len(arrived) - taken)
            self._waiting[self._filled : self._filled + count] = arrived[taken : taken + count]
            self._filled += count
            taken += count
            if self._filled == size:
                self._write(begin, self._waiting[:size].reshape(-1, self._columns))
                self._filled = 0
        return True

    def _write(self, begin: int, rows: Any) -> None:
        import numpy as np

        codes, scales = FP8.encode(rows, self._wide)
        path, offset = self._codes
        self._worker.write(codes.reshape(-1).data, path, offset + begin)
        path, offset = self._scales  # a tensor of its own, four bytes for each block
        position = offset + begin // self._row * self._across * 4
        self._worker.write(scales.view(np.uint8).data, path, position)
