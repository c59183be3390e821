"""Strips of a matrix that a format stores the other way round, [in, out].

Columns of what is stored are rows of the weight. A block is a few rows, and cutting those out of
the file would read every line of it for each block; so each thread keeps the latest strip of each
model.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from itertools import count
from typing import Any

from merge_cli.checkpoint.dtypes import width_of
from merge_cli.checkpoint.headers import TensorRef
from merge_cli.checkpoint.tensors import Read, read_pieces

STRIP_BYTES = 2**22  # of codes, for each thread and model; of their scales it is less
_SKIPPED = 2**13  # bytes of a line: from here on its piece is read without the rest
_SLAB_BYTES = 2**18  # of lines that are read whole to cut a strip out of them, in the cache
_KEPT = 64  # strips that a thread keeps: of more models than are merged at once
_openings = count()


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix inside a stored tensor, of which strips of columns are read.

    Attributes:
        role: what it is to a weight (codes, scales): a thread keeps one strip of each.
        start: its first element's number in the tensor.
        height, width: in stored elements.
        opening: tells apart what was opened at different times: files may have changed between.
    """

    role: str
    ref: TensorRef
    start: int
    height: int
    width: int
    opening: int

    def columns(self, read: Read, first: int, last: int) -> Any:
        """Columns [first, last): numpy [height, last - first] of unsigned integers or bytes."""
        import numpy as np

        item = width_of(self.ref.dtype)
        wide = max(1, min(self.width, STRIP_BYTES // max(1, self.height * item)))
        parts = []
        for number in range(first // wide, -(-last // wide)):
            begin = number * wide
            strip = self._strip(read, begin, min(begin + wide, self.width))
            parts.append(strip[:, max(0, first - begin) : last - begin])
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    def _strip(self, read: Read, first: int, last: int) -> Any:
        """A strip from the thread's latest, or read."""
        kept = _threads.kept
        strip_key = f"{self.role} of {self.ref.model}"
        key = (self.opening, self.ref, self.start, first, last)
        latest = kept.get(strip_key)
        if latest is not None and latest[0] == key:
            return latest[1]
        if len(kept) >= _KEPT:
            kept.clear()
        strip = self._read(read, first, last)
        kept[strip_key] = (key, strip)
        return strip

    def _read(self, read: Read, first: int, last: int) -> Any:
        import numpy as np

        kind = {1: np.uint8, 2: np.uint16, 4: np.uint32}[width_of(self.ref.dtype)]
        strip = np.empty((self.height, last - first), kind)
        # Pieces of lines by themselves, where reading all of the lines would take longer.
        if (self.width - last + first) * strip.itemsize > _SKIPPED:
            starts = self.start + first + np.arange(self.height, dtype=np.int64) * self.width
            read_pieces(read, self.ref, starts, strip)
            return strip
        step = max(1, _SLAB_BYTES // (self.width * strip.itemsize))
        slab = np.empty((min(step, self.height), self.width), kind)
        for low in range(0, self.height, step):
            high = min(low + step, self.height)
            lines = slab[: high - low]
            read(self.ref, self.start + low * self.width, lines.view(np.uint8).reshape(-1).data)
            strip[low:high] = lines[:, first:last]
        return strip


def opening() -> int:
    """A number for a model that is opened now."""
    return next(_openings)


class _Strips(threading.local):
    """The latest strips of a thread: by role and model, each with what tells it apart."""

    def __init__(self) -> None:
        self.kept: dict[str, tuple[Any, Any]] = {}


_threads = _Strips()
