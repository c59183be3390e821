"""The sources' stored bytes in memory, behind the interface through which the engine reads files.

What the engine computes with is the same bytes that lie on disk, so that a candidate's weights are
the same bits that a merge of its recipe writes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from merge_cli.checkpoint.header import DTYPES, TensorRef
from merge_cli.checkpoint.raw import FilePool, read_into
from merge_cli.engine.lanes import Clock, Files
from merge_cli.evaluation.live import free_memory
from merge_cli.sizes import show_size

_SHARE = 0.5  # of free memory; the live model, activations and other workers take the rest


@dataclass(frozen=True)
class Place:
    """Where the sources' bytes wait, and why there."""

    residency: Literal["memory", "disk"]
    reason: str
    bytes: int


def choose_place(refs: Iterable[TensorRef], workers: int = 1) -> Place:
    """Memory where all workers' copies fit, else the disk, which is read for every candidate."""
    size = sum(ref.nbytes for ref in {(r.path, r.offset): r for r in refs}.values())
    room = int(free_memory("cpu", ()) * _SHARE) // workers
    if size <= room:
        return Place("memory", f"{show_size(size)} fit in memory", size)
    return Place("disk", f"{show_size(size)}, and room for {show_size(room)} in memory", size)


class ResidentFiles(Files):
    """Sources from memory (or disk), outputs into buffers.

    Attributes:
        outputs: for each path that is written to, numpy uint8; put here before, taken out after.
    """

    def __init__(self, place: Place) -> None:
        self._disk = FilePool(os.O_RDONLY)
        super().__init__(self._disk, self._disk)
        self._place = place
        self._kept: dict[tuple[Path, int], memoryview] = {}
        self.outputs: dict[Path, Any] = {}

    def keep(self, refs: Iterable[TensorRef]) -> None:
        """Read tensors into memory, unless the place is the disk; each once."""
        if self._place.residency == "disk":
            return
        for ref in refs:
            where = ref.path, ref.offset
            if where not in self._kept:
                buffer = memoryview(bytearray(ref.nbytes))
                if ref.nbytes:
                    read_into(self._disk, ref.path, ref.offset, buffer, ref.model)
                self._kept[where] = buffer

    def ask_for(self, ref: TensorRef, start: int, size: int) -> None:
        if self._place.residency == "disk":
            super().ask_for(ref, start, size)

    def read_stored(self, clock: Clock, ref: TensorRef, start: int, buffer: memoryview) -> None:
        kept = self._kept.get((ref.path, ref.offset))
        if kept is None:
            super().read_stored(clock, ref, start, buffer)
            return
        began = time.perf_counter()
        offset = start * DTYPES[ref.dtype][0]
        view = buffer.cast("B")
        view[:] = kept[offset : offset + len(view)]
        clock.read += time.perf_counter() - began
        clock.bytes_read += len(view)

    def write(self, clock: Clock, path: Path, offset: int, data: memoryview) -> None:
        self._put(path, offset, data)
        clock.bytes_written += data.nbytes

    def copy(
        self, clock: Clock, ref: TensorRef, start: int, size: int, path: Path, offset: int
    ) -> None:
        buffer = memoryview(bytearray(size))
        self.read_stored(clock, ref, start // DTYPES[ref.dtype][0], buffer)
        self._put(path, offset, buffer)

    def close(self) -> None:
        """Let go of files and memory."""
        self._disk.close()
        self._kept.clear()

    def _put(self, path: Path, offset: int, data: memoryview) -> None:
        import numpy as np

        raw = np.frombuffer(data.cast("B"), np.uint8)
        self.outputs[path][offset : offset + len(raw)] = raw
