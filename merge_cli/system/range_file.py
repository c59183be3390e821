"""A file elsewhere as a file: what is read of it is fetched in blocks, and those are kept."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from typing import Any

BLOCK = 2**18
_KEPT = 64  # blocks


class PositionedFile(io.RawIOBase):
    """A file that is read from a position; what is read there, subclasses say.

    Args:
        size: of the whole file.
    """

    def __init__(self, size: int) -> None:
        self._size, self._position = size, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        if origin + offset < 0:
            raise OSError("before its beginning")  # as files do; zipfile expects it
        self._position = origin + offset
        return self._position

    def _bytes_to_read(self, size: int | None) -> int:
        """How many bytes `read(size)` returns from here."""
        left = max(0, self._size - self._position)
        return left if size is None or size < 0 else min(size, left)


class RangeFile(PositionedFile):
    """A file of which ranges can be had.

    Args:
        size: of the whole file.
        fetch: returns bytes [start, stop) of it.
        block: bytes that are fetched at once, at least.
    """

    def __init__(self, size: int, fetch: Callable[[int, int], bytes], block: int = BLOCK) -> None:
        super().__init__(size)
        self._fetch, self._block = fetch, block
        self._blocks: dict[int, bytes] = {}
        self._ahead, self._next = 1, -1  # blocks to fetch, and which follows the last of them

    def read(self, size: int | None = -1) -> Any:
        count = self._bytes_to_read(size)
        block = self._block
        start, stop = self._position, self._position + count
        first, last = start // block, -(-stop // block)
        missing = [number for number in range(first, last) if number not in self._blocks]
        if missing:  # one request for all between the first and the last that are missing
            low = missing[0] * block
            # Who reads on gets twice as much at once: a vocabulary of 12 MB by six requests.
            self._ahead = min(2 * self._ahead, _KEPT // 2) if missing[0] == self._next else 1
            self._next = max(missing[-1] + 1, missing[0] + self._ahead)
            data = self._fetch(low, min(self._next * block, self._size))
            for number in range(missing[0], min(self._next, -(-self._size // block))):
                at = number * block - low
                self._blocks[number] = data[at : at + block]
        joined = b"".join(self._blocks[number] for number in range(first, last))
        while len(self._blocks) > _KEPT:
            del self._blocks[next(iter(self._blocks))]
        self._position = stop
        return joined[start - first * block :][:count]
