"""Positioned reads and writes of bytes, which finish or say why they cannot."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import struct
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from merge_cli.errors import CorruptFileError, ResourceError

_COPY_BYTES = 4 * 2**20
_PREADV = getattr(os, "preadv", None)


class FilePool:
    """File descriptors opened once and shared by threads; pread and pwrite keep no position."""

    def __init__(self, flags: int) -> None:
        self._flags = flags | getattr(os, "O_CLOEXEC", 0)
        self._open: dict[Path, int] = {}
        self._lock = threading.Lock()

    def fd(self, path: Path) -> int:
        fd = self._open.get(path)
        if fd is not None:  # asked for every read: no lock, once it is open
            return fd
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
        size = len(buffer)
        while done < size:
            count = _pread_into(fd, buffer[done:] if done else buffer, offset + done)
            if count == 0:
                message = f"ends {size - done} bytes early: it changed since the plan was made"
                raise CorruptFileError(message, model=model, file=path.name)
            done += count
    except OSError as error:
        raise CorruptFileError(
            f"cannot be read: {error.strerror}",
            model=model,
            file=path.name,
            hint="The journal is kept: the same command resumes.",
        ) from error


def _pread_into(fd: int, buffer: memoryview, offset: int) -> int:
    if _PREADV is not None:
        return int(_PREADV(fd, [buffer], offset))
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
            done += os.pwrite(fd, data[done:] if done else data, offset + done)
    except OSError as error:
        raise write_error(error, path) from error


def copy_range(
    sources: FilePool,
    source: Path,
    start: int,
    targets: FilePool,
    target: Path,
    offset: int,
    size: int,
    model: str,
) -> None:
    """Copy `size` bytes from one file into another, without bringing them here if possible.

    Raises:
        CorruptFileError: the source ended early, vanished, or its disk failed.
        ResourceError: the target's disk is full or failed.
    """
    done = 0
    if hasattr(os, "copy_file_range"):
        try:
            fds = sources.fd(source), targets.fd(target)
            while done < size:
                count = os.copy_file_range(*fds, size - done, start + done, offset + done)
                if count == 0:
                    break
                done += count
        except OSError:
            pass  # another file system, an old kernel, or a failure that the plain way will name
    buffer = memoryview(bytearray(min(size - done, _COPY_BYTES)))
    while done < size:
        part = buffer[: size - done]
        read_into(sources, source, start + done, part, model)
        write_from(targets, target, offset + done, part)
        done += len(part)


def read_ahead(files: FilePool, path: Path, offset: int, size: int) -> None:
    """Ask the system to bring a range into its cache while we do something else.

    Nothing is promised and nothing fails: it is a hint, left out where it has no use.
    """
    try:
        fd = files.fd(path)
        if _is_cached(fd, offset) and _is_cached(fd, offset + size - 1):
            return
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, offset, size, os.POSIX_FADV_WILLNEED)
        elif sys.platform == "darwin":
            # struct radvisory: where, and how much (an int).
            advice = struct.pack("qi4x", offset, min(size, 2**31 - 1))
            fcntl.fcntl(fd, fcntl.F_RDADVISE, advice)
    except OSError:
        return  # the read itself will say what is wrong


def _is_cached(fd: int, offset: int) -> bool:
    """Whether a byte is in the system's cache already: asking for what is there costs time."""
    if not hasattr(os, "RWF_NOWAIT"):
        return False
    try:
        return os.preadv(fd, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    except BlockingIOError:
        return False


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


def replace_file(path: Path, content: bytes) -> int:
    """Write a file, whole or not at all, and wait for the disk.

    Returns:
        its length.

    Raises:
        ResourceError: it cannot be written.
    """
    new = path.with_name(f"{path.name}.new")
    try:
        with new.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except OSError as error:
        raise write_error(error, path) from error
    return len(content)


@contextmanager
def unfinished_file(path: Path) -> Iterator[Path]:
    """A new file beside `path`, which takes its place at the end; gone after an error.

    For files that several processes may write at once, without a lock: each has a file of its own,
    and the last one stays. The folder is made.

    Raises:
        OSError: the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent)
    os.close(handle)
    try:
        yield Path(name)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)  # gone where it has become the file


def link_or_copy(blob: Path, pointer: Path) -> None:
    """Link to a cached file from a snapshot of a cache; copy it where there are no links."""
    if pointer.exists() and pointer.stat().st_size == blob.stat().st_size:
        return
    pointer.parent.mkdir(parents=True, exist_ok=True)
    pointer.unlink(missing_ok=True)  # a dangling link, or an incomplete copy
    try:
        pointer.symlink_to(os.path.relpath(blob, pointer.parent))
    except OSError:
        new = pointer.with_name(f"{pointer.name}.{os.getpid()}.new")
        shutil.copyfile(blob, new)
        os.replace(new, pointer)


def sync(paths: Iterable[Path]) -> None:
    """Wait until files and folders have reached the disk itself."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def write_error(error: OSError, path: Path) -> ResourceError:
    """What an operating system's refusal to write means to the user."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        hint = "Free some space and run the same command: it resumes."
        return ResourceError("the disk is full", where=str(path), hint=hint)
    return ResourceError(f"cannot be written: {error.strerror}", where=str(path))
