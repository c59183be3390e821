"""The files of a merge, and the clock of a thread that reads and writes them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_cli.checkpoint.dtypes import width_of
from merge_cli.checkpoint.headers import TensorRef
from merge_cli.checkpoint.tensors import Tensor
from merge_cli.kernels.pieces import read_pieces
from merge_cli.system.raw_io import FilePool, copy_range, read_ahead, read_into, write_from


@dataclass
class StageClock:
    """Seconds that a thread has spent, and bytes that it has moved."""

    read: float = 0.0
    compute: float = 0.0
    write: float = 0.0
    waited: float = 0.0
    bytes_read: int = 0
    bytes_written: int = 0

    def measure(self, work: Callable[[], None]) -> None:
        """What is neither reading, writing nor waiting is computing."""
        began, other = time.perf_counter(), self.read + self.write + self.waited
        work()
        self.compute += time.perf_counter() - began
        self.compute -= self.read + self.write + self.waited - other

    def add(self, spent: Any) -> None:
        """What a loop has spent that reads and writes itself: see `kernels.streams.Streams.run`."""
        read, write, bytes_read, bytes_written = spent.tolist()
        self.read += read
        self.write += write
        self.bytes_read += int(bytes_read)
        self.bytes_written += int(bytes_written)


class Files:
    """The files of a merge: sources open for reading, shards for writing.

    Attributes:
        on_disk: loops may read and write them by themselves.
    """

    on_disk = True

    def __init__(self, sources: FilePool, shards: FilePool) -> None:
        self.sources, self.shards = sources, shards

    def ask_for(self, ref: TensorRef, start: int, size: int) -> None:
        """Have the system bring `size` bytes from byte `start` of a tensor into its cache."""
        read_ahead(self.sources, ref.path, ref.offset + start, size)

    def read(self, clock: StageClock, tensor: Tensor, start: int, buffer: memoryview) -> None:
        """Fill the buffer with a tensor's elements from `start` on."""
        if type(tensor) is TensorRef:  # as a rule: no call between
            self.read_stored(clock, tensor, start, buffer)
            return
        tensor.fill(StoredRead(self, clock), start, buffer)

    def read_stored(
        self, clock: StageClock, ref: TensorRef, start: int, buffer: memoryview
    ) -> None:
        """Fill the buffer with what is stored from element `start` on."""
        began = time.perf_counter()
        offset = ref.offset + start * width_of(ref.dtype)
        read_into(self.sources, ref.path, offset, buffer, ref.model)
        clock.read += time.perf_counter() - began
        clock.bytes_read += len(buffer)

    def read_pieces(self, clock: StageClock, ref: TensorRef, starts: Any, out: Any) -> None:
        """Fill rows of bytes with what is stored from their starts on: `tensors.read_pieces`."""
        began = time.perf_counter()
        offsets = ref.offset + starts * width_of(ref.dtype)
        try:
            done = read_pieces(self.sources.fd(ref.path), offsets, out)
        except OSError:
            done = 0
        for number in range(done, len(out)):  # the plain way says what is wrong
            offset = int(offsets[number])
            read_into(self.sources, ref.path, offset, out[number].data, ref.model)
        clock.read += time.perf_counter() - began
        clock.bytes_read += out.size

    def write(self, clock: StageClock, path: Path, offset: int, data: memoryview) -> None:
        began = time.perf_counter()
        write_from(self.shards, path, offset, data)
        clock.write += time.perf_counter() - began
        clock.bytes_written += len(data)

    def copy(
        self, clock: StageClock, ref: TensorRef, start: int, size: int, path: Path, offset: int
    ) -> None:
        """Move `size` stored bytes from byte `start` of a tensor, inside the kernel if it can."""
        began = time.perf_counter()
        copy_range(
            self.sources, ref.path, ref.offset + start, self.shards, path, offset, size, ref.model
        )
        clock.write += time.perf_counter() - began
        clock.bytes_read += size
        clock.bytes_written += size


@dataclass(frozen=True)
class StoredRead:
    """How computed tensors read what they are made of: a `tensors.BulkRead`."""

    files: Files
    clock: StageClock

    def __call__(self, ref: TensorRef, start: int, buffer: memoryview) -> None:
        self.files.read_stored(self.clock, ref, start, buffer)

    def pieces(self, ref: TensorRef, starts: Any, out: Any) -> None:
        self.files.read_pieces(self.clock, ref, starts, out)
