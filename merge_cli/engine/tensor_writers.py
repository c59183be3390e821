"""Write merged values: rounded block by block, or in codes by groups with their scales."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from merge_cli.checkpoint.dtypes import width_of
from merge_cli.checkpoint.headers import TensorRef
from merge_cli.engine.worker_context import WorkerContext
from merge_cli.formats.encoding import Encoding, Tiles, stored_parts
from merge_cli.formats.stored_parts import as_bytes
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
    task: TensorTask,
    worker: WorkerContext,
    offsets: OutputOffsets,
    start: int,
    stop: int,
    largest: float | None = None,
) -> TensorWriter:
    """For elements [start, stop) of a task's output.

    Args:
        largest: the largest magnitude of the whole output, where its encoding must know it.
    """
    if task.encoding is None:
        return _RoundingWriter(task, worker, offsets)
    return _EncodingWriter(task, task.encoding, worker, offsets, start, stop, largest)


class _RoundingWriter:
    def __init__(self, task: TensorTask, worker: WorkerContext, offsets: OutputOffsets) -> None:
        self._dtype, self._worker = task.dtype, worker
        self._path, self._offset = offsets[task.name]

    def put(self, values: Any, start: int) -> bool:
        position = self._offset + start * width_of(self._dtype)
        return self._worker.store(values, self._dtype, self._path, position)


class _EncodingWriter:
    """Waits for whole tiles, since a scale is known when its group is."""

    def __init__(
        self,
        task: TensorTask,
        encoding: Encoding,
        worker: WorkerContext,
        offsets: OutputOffsets,
        start: int,
        stop: int,
        largest: float | None,
    ) -> None:
        import numpy as np

        self._encoding, self._shape, self._worker, self._stop = encoding, task.shape, worker, stop
        self._parts = encoding.parts(task.shape)
        self._offsets = [offsets[part.output(task.name).name] for part in self._parts]
        self._tile, self._span = encoding.tile(task.shape), encoding.span(task.shape)
        self._waiting = np.empty(min(self._tile, stop - start), np.float32)
        self._filled = 0
        self._kept = task.kept
        self._refs: Sequence[TensorRef] = ()
        if self._kept is not None:
            self._refs = stored_parts(encoding, self._kept.name, task.shape, self._kept)
        self._scale = 1.0
        if largest is not None:
            self._scale = encoding.tensor_scale(largest, self._before(0, 0))
        self._buffers: list[Any] = []  # of the span that is being filled, if it has several tiles

    def put(self, values: Any, start: int) -> bool:
        # Blocks are cut for the cache and end in the middle of a tile, whose scale is known when it
        # is complete: its values wait. A chunk always begins and ends with a whole one
        # (`plan.span_starts`), so nothing waits for another thread.
        arrived = self._worker.fetch(values)
        taken = 0
        if self._filled:
            begin = start - self._filled
            size = min(self._tile, self._stop - begin)
            taken = min(size - self._filled, len(arrived))
            self._waiting[self._filled : self._filled + taken] = arrived[:taken]
            self._filled += taken
            if self._filled < size:
                return True
            self._encode(self._waiting[:size], begin)
            self._filled = 0
        whole = (len(arrived) - taken) // self._tile * self._tile
        if start + len(arrived) == self._stop:
            whole = len(arrived) - taken  # the last tile may be smaller
        if whole:
            self._encode(arrived[taken : taken + whole], start + taken)
        rest = arrived[taken + whole :]
        self._waiting[: len(rest)] = rest
        self._filled = len(rest)
        return True

    def _encode(self, values: Any, begin: int) -> None:
        """Whole tiles, from element `begin` on."""
        if self._span == self._tile:
            self._write(begin, begin + len(values), values, begin, complete=True)
            return
        while len(values):
            first = begin // self._span * self._span
            last = min(first + self._span, self._stop)
            count = min(len(values), last - begin)
            self._write(first, last, values[:count], begin, complete=begin + count == last)
            values, begin = values[count:], begin + count

    def _write(self, first: int, last: int, values: Any, begin: int, *, complete: bool) -> None:
        """Encode values that lie in [first, last), and write that when it is complete."""
        import numpy as np

        before = None
        if self._kept is not None:
            before = np.empty(len(values), np.float32)
            self._worker.read(self._kept, begin, before.view(np.uint8).data)
        stored = self._buffers or self._before(first, last)
        if not stored:
            sizes = [end - start for start, end in (p.bytes_of(first, last) for p in self._parts)]
            stored = [np.empty(size, np.uint8) for size in sizes]
        tiles = Tiles(values, self._shape, begin - first, self._scale, before)
        self._encoding.encode(tiles, stored)
        self._buffers = [] if complete else stored
        if not complete:
            return
        for part, raw, (path, offset) in zip(self._parts, stored, self._offsets, strict=True):
            self._worker.write(raw.data, path, offset + part.bytes_of(first, last)[0])

    def _before(self, start: int, stop: int) -> list[Any]:
        """What the tensor whose blocks are kept has stored for elements [start, stop).

        Of none, what it has for all of them: scales of the whole tensor.
        """
        import numpy as np

        stored = []
        for part, ref in zip(self._parts, self._refs, strict=False):
            begin, end = part.bytes_of(start, stop)
            if start == stop and ref.nbytes == part.width:
                end = begin + part.width
            raw = np.empty(end - begin, np.uint8)
            if len(raw):
                self._worker.read(as_bytes(ref), begin, raw.data)
            stored.append(raw)
        return stored
