"""The least that a merge of these bytes can take: they are read, and as many are written. No more.

    python scripts/bench_floor.py SPEC.json

SPEC holds {"inputs": [paths], "outputs": [[path, bytes]], "threads": N}. Each input byte is read
once by preadv into a page-aligned buffer of 8 MiB, one for each thread and always the same; each
output is allocated as merge-cli allocates (posix_fallocate) and written by pwrite from that buffer.
Threads take the next chunk from one list, reads first and writes after them, without a wait in
between. Prints {"seconds", "user_seconds", "system_seconds", "read", "written"} of that alone: not
of the interpreter.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_CHUNK = 8 * 2**20

# A chunk: the call that moves it (preadv or pwrite in the end), descriptor, offset, bytes.
Job = tuple[Callable[[int, int, memoryview], None], int, int, int]


def read_and_write(inputs: list[str], outputs: list[tuple[str, int]], threads: int) -> int:
    """Move all the bytes with so many threads; returns the bytes read."""
    reading = [(os.open(path, os.O_RDONLY), os.stat(path).st_size) for path in inputs]
    writing = [(_allocate(path, size), size) for path, size in outputs]
    jobs = [
        *(job for fd, size in reading for job in _chunks(_read, fd, size)),
        *(job for fd, size in writing for job in _chunks(_write, fd, size)),
    ]
    # next() on a list's iterator is one step under the interpreter's lock: no chunk is taken twice.
    todo = iter(jobs)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            buffer = memoryview(mmap.mmap(-1, _CHUNK))
            for move, fd, offset, count in todo:
                move(fd, offset, buffer[:count])
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for fd, _ in [*reading, *writing]:
        os.close(fd)
    if failures:
        raise failures[0]
    return sum(size for _, size in reading)


def _chunks(move: Callable[[int, int, memoryview], None], fd: int, size: int) -> Iterator[Job]:
    for offset in range(0, size, _CHUNK):
        yield move, fd, offset, min(_CHUNK, size - offset)


def _read(fd: int, offset: int, buffer: memoryview) -> None:
    done = 0
    while done < len(buffer):
        count = os.preadv(fd, [buffer[done:]], offset + done)
        if not count:
            raise EOFError(f"an input ended at {offset + done}")
        done += count


def _write(fd: int, offset: int, buffer: memoryview) -> None:
    done = 0
    while done < len(buffer):
        done += os.pwrite(fd, buffer[done:], offset + done)


def _allocate(path: str, size: int) -> int:
    """As merge_cli/system/raw_io.py does, so that both pay for it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    if hasattr(os, "posix_fallocate") and size:
        try:
            os.posix_fallocate(fd, 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
    os.ftruncate(fd, size)
    return fd


def main() -> None:
    spec: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    outputs = [(path, size) for path, size in spec["outputs"]]
    began, busy = time.perf_counter(), os.times()
    read = read_and_write(spec["inputs"], outputs, spec["threads"])
    after = os.times()
    result = {
        "seconds": time.perf_counter() - began,
        "user_seconds": after.user - busy.user,
        "system_seconds": after.system - busy.system,
        "read": read,
        "written": sum(size for _, size in outputs),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
