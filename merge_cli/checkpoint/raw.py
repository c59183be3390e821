"""Bytes in, bytes out: positioned reads and writes that finish or say why not."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

from merge_cli.errors import CorruptFileError, ResourceError


class FilePool:
    """File descriptors opened once and shared by threads; pread and pwrite keep no position."""

    def __init__(self, flags: int) -> None:
        self._flags = flags | getattr(os, "O_CLOEXEC", 0)
        self._open: dict[Path, int] = {}
        self._lock = threading.Lock()

    def fd(self, path: Path) -> int:
        with self._lock:
            if path not in self._open:
                self._open[path] = os.open(path, self._flags)
            return self._open[path]

    def close(self) -> None:
        with self._lock:
            for fd in self._open.values():
                os.close(fd)
            self._open.clear()


def read_into(files: FilePool, path: Path, offset: int, buffer: memoryview, model: str) -> None:
    """Fill `buffer` from the bytes at `offset`.

    Raises:
        CorruptFileError: the file ended early, vanished, or the disk failed.
    """
    done = 0
    try:
        fd = files.fd(path)
        while done < len(buffer):
            count = _pread_into(fd, buffer[done:], offset + done)
            if count == 0:
                what = f"ends {len(buffer) - done} bytes early: it changed since the plan was made"
                raise CorruptFileError(what, model=model, file=path.name)
            done += count
    except OSError as error:
        raise CorruptFileError(
            f"cannot be read: {error.strerror}", model=model, file=path.name,
            hint="The journal is kept: the same command resumes.",
        ) from error  # fmt: skip


def _pread_into(fd: int, buffer: memoryview, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(fd, [buffer], offset)
    data = os.pread(fd, len(buffer), offset)  # old macOS: one copy more
    buffer[: len(data)] = data
    return len(data)


def write_from(files: FilePool, path: Path, offset: int, data: memoryview) -> None:
    """Write all of `data` at `offset`.

    Raises:
        ResourceError: the disk is full or failed.
    """
    done = 0
    try:
        fd = files.fd(path)
        while done < len(data):
            done += os.pwrite(fd, data[done:], offset + done)
    except OSError as error:
        raise write_error(error, path) from error


def allocate(path: Path, size: int, header: bytes) -> None:
    """Create a file of its final size with its header, so that a full disk shows at once.

    Raises:
        ResourceError: no room, or not writable.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if hasattr(os, "posix_fallocate") and size:
                try:
                    os.posix_fallocate(fd, 0, size)
                except OSError as error:
                    if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                        raise
            os.ftruncate(fd, size)
            os.pwrite(fd, header, 0)
        finally:
            os.close(fd)
    except OSError as error:
        raise write_error(error, path) from error


def has_header(path: Path, size: int, header: bytes) -> bool:
    """Whether a file is there with this size and this beginning."""
    try:
        with path.open("rb") as file:
            return path.stat().st_size == size and file.read(len(header)) == header
    except OSError:
        return False


def write_error(error: OSError, path: Path) -> ResourceError:
    """What an operating system's refusal to write means to the user."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        hint = "Free some space and run the same command: it resumes."
        return ResourceError("the disk is full", where=str(path), hint=hint)
    return ResourceError(f"cannot be written: {error.strerror}", where=str(path))
