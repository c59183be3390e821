"""The file that statistics become: made by one process, whole or not at all, named by its making.

Arrays are written one by one, wherever they belong, so that not all of them are ever in memory.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

from merge_cli.checkpoint.statistics import (
    FORMAT,
    StatisticsEntry,
    StatisticsFile,
    header_sum,
    open_statistics,
    statistics_digest,
)
from merge_cli.errors import CorruptFileError, ResourceError
from merge_cli.system.caches import cache_folder
from merge_cli.system.machine import show_size
from merge_cli.system.raw_io import write_error
from merge_cli.system.workspace import is_at, lock_file

_SPARE = 8192  # bytes of the header for what is known at the end
_HINT = "Free some space, or set MERGE_CLI_CACHE to another folder."


def statistics_path(key: str) -> Path:
    """The file of statistics that are made like this."""
    return cache_folder() / "statistics" / key[:2] / f"{key}.safetensors"


def find(path: Path, *, read: bool = False) -> StatisticsFile | None:
    """What is in the cache; None where nothing is, or what is not what was written.

    Args:
        read: look at every byte, rather than at the header alone.
    """
    if not path.exists():
        return None
    try:
        statistics = open_statistics(path)
    except CorruptFileError:
        return None  # not whole: made again, and replaced
    return statistics if not read or statistics.is_whole() else None


@contextmanager
def making(path: Path, waiting: Callable[[], None]) -> Iterator[Path | None]:
    """The unfinished file, for one process at a time; None where another has finished it meanwhile.

    Args:
        waiting: called once, if another process is at it.

    Raises:
        ResourceError: the cache cannot be written.
    """
    partial = path.with_suffix(".partial")
    try:
        lock = _locked(partial, waiting)
    except OSError as error:
        raise _unwritable(error, partial) from error
    try:
        yield None if find(path, read=True) is not None else partial
    finally:
        if is_at(partial, lock):  # else it has become the file, and what is there is another's
            partial.unlink()
        os.close(lock)


def _locked(partial: Path, waiting: Callable[[], None]) -> int:
    """A descriptor of the unfinished file, locked. One that was renamed meanwhile is let go."""
    partial.parent.mkdir(parents=True, exist_ok=True)
    lock = lock_file(partial)
    if lock is None:
        waiting()
        lock = lock_file(partial, wait=True)
        assert lock is not None, "it has waited"
    return lock


class Writer:
    """Writes a file of statistics.

    Args:
        path: the unfinished file.
        shapes: every array's.
        entries: a tensor as the model stores it -> its array.

    Raises:
        ResourceError: from any method: it cannot be written.
    """

    def __init__(
        self,
        path: Path,
        kind: str,
        shapes: Mapping[str, tuple[int, ...]],
        entries: Mapping[str, StatisticsEntry],
    ) -> None:
        self._path, self._kind, self._shapes, self._entries = path, kind, dict(shapes), entries
        self._digests: dict[str, str] = {}
        self._zero: set[str] = set()
        ends = accumulate((4 * math.prod(shape) for shape in self._shapes.values()), initial=0)
        self._offsets = dict(zip([*self._shapes, ""], ends, strict=True))
        unknown = dict.fromkeys(self._shapes, "0" * 64)
        self._room = len(self._header({}, "0" * 64, unknown)) + _SPARE
        self._room += -self._room % 8
        needed = 8 + self._room + self._offsets[""]
        try:
            stat = os.statvfs(path.parent)
            free = stat.f_bavail * stat.f_frsize
            if free < needed:
                message = f"statistics take {show_size(needed)}, and {show_size(free)} is free"
                raise ResourceError(message, where=str(path.parent), hint=_HINT)
            self._file = path.open("r+b")
            self._file.truncate(needed)
        except OSError as error:
            raise _unwritable(error, path) from error

    def put(self, name: str, array: Any) -> None:
        """Write one array: contiguous, float32, of the shape that was announced."""
        raw = array.reshape(-1).view("uint8").data
        assert len(raw) == 4 * math.prod(self._shapes[name])
        if not array.any():
            self._zero.add(name)
        self._digests[name] = hashlib.sha256(raw).hexdigest()
        try:
            self._file.seek(8 + self._room + self._offsets[name])
            self._file.write(raw)
        except OSError as error:
            raise _unwritable(error, self._path) from error

    def finish(self, path: Path, about: Mapping[str, Any]) -> StatisticsFile:
        """Write the header, and give the file its name."""
        about = json.loads(json.dumps(dict(about)))  # as it will be read
        digest = statistics_digest(self._kind, self._written(), self._digests, about)
        # Blanks are part of the format.
        header = self._header(about, digest, self._digests).ljust(self._room)
        assert len(header) == self._room
        assert self._digests.keys() == self._shapes.keys()
        try:
            self._file.seek(0)
            self._file.write(struct.pack("<Q", len(header)) + header)
            self._file.flush()
            os.fsync(self._file.fileno())  # a name without its bytes would be believed
            self._file.close()
            os.replace(self._path, path)
        except OSError as error:
            raise _unwritable(error, self._path) from error
        return open_statistics(path)

    def close(self) -> None:
        """Close the file, finished or not."""
        self._file.close()

    def _written(self) -> dict[str, list[Any]]:
        """Entries as numbers: whether an array is 0 must not change the header's length."""
        return {
            name: [item.array, int(item.input_first), int(item.array not in self._zero)]
            for name, item in sorted(self._entries.items())
        }

    def _header(self, about: Mapping[str, Any], digest: str, digests: Mapping[str, str]) -> bytes:
        document: dict[str, Any] = {
            "__metadata__": {
                "format": FORMAT,
                "kind": self._kind,
                "digest": digest,
                "about": json.dumps(dict(about)),
                "entries": json.dumps(self._written()),
                "digests": json.dumps(dict(digests)),
                "sum": header_sum(digest, self._shapes),
            }
        }
        for name, shape in self._shapes.items():
            start = self._offsets[name]
            stop = start + 4 * math.prod(shape)
            document[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, stop]}
        return json.dumps(document).encode()


def _unwritable(error: OSError, path: Path) -> ResourceError:
    result = write_error(error, path)
    return ResourceError(result.message, where=result.where, hint=_HINT)
