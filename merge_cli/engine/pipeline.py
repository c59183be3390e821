"""The one loop: read, compute, write, at the same time, within a window of bytes.

    readers ──▶ to compute ──▶ computers ──▶ to write ──▶ writers ──▶ journal
       ▲                                                     │
       └───────────── window: bytes in flight ◀──────────────┘

Each stage is a function of a unit, with its own threads and its own clock; the order in which
units finish is free, since each writes to its own bytes. The first failure stops everything, after
the units that are in the middle of a write.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from merge_cli.engine.statistics import TensorStats
from merge_cli.engine.units import Unit

if TYPE_CHECKING:
    from torch import Tensor

Read = Callable[[Unit], "list[Tensor]"]
Compute = Callable[[Unit, "list[Tensor]"], "tuple[Tensor, TensorStats]"]
Write = Callable[[Unit, "Tensor", TensorStats], None]
_POLL_SECONDS = 0.2


@dataclass
class StageClock:
    """Busy seconds and bytes of one stage, summed over its threads."""

    seconds: float = 0.0
    bytes: int = 0
    threads: int = 1
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, seconds: float, count: int) -> None:
        with self._lock:
            self.seconds += seconds
            self.bytes += count


class Window:
    """A bound on the bytes in flight. A unit larger than the window passes when it is alone."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.used, self.peak = capacity, 0, 0
        self._free = threading.Condition()

    def acquire(self, size: int, stop: threading.Event) -> bool:
        """Wait for room; False if stopped meanwhile."""
        with self._free:
            while self.used and self.used + size > self.capacity:
                if stop.is_set():
                    return False
                self._free.wait(_POLL_SECONDS)
            self.used += size
            self.peak = max(self.peak, self.used)
            return not stop.is_set()

    def release(self, size: int) -> None:
        with self._free:
            self.used -= size
            self._free.notify_all()


@dataclass
class Pipeline:
    """Runs units through three stages.

    Attributes:
        cost: bytes that a unit holds from the start of its read to the end of its write.
        on_done: called in the calling thread after each finished unit.
    """

    read: Read
    compute: Compute
    write: Write
    cost: Callable[[Unit], int]
    window: Window
    readers: int = 2
    computers: int = 1
    writers: int = 1
    on_done: Callable[[Unit, TensorStats], None] | None = None
    clocks: dict[str, StageClock] = field(default_factory=dict)

    def run(self, units: Sequence[Unit]) -> None:
        """Process every unit; returns when all are written.

        Raises:
            the first exception of any stage; KeyboardInterrupt as it comes. Either way every
            thread has ended when it is raised, so that a journal can be closed.
        """
        stop = threading.Event()
        finished: queue.SimpleQueue[tuple[Unit, TensorStats] | BaseException] = queue.SimpleQueue()
        to_read: queue.SimpleQueue[Unit] = queue.SimpleQueue()
        to_compute: queue.SimpleQueue[tuple[Unit, list[Tensor]] | None] = queue.SimpleQueue()
        to_write: queue.SimpleQueue[tuple[Unit, Tensor, TensorStats] | None] = queue.SimpleQueue()
        for unit in units:
            to_read.put(unit)
        order = threading.Lock()  # room is given in the units' order, or a large one might starve
        self.clocks = {
            "read": StageClock(threads=self.readers),
            "compute": StageClock(threads=self.computers),
            "write": StageClock(threads=self.writers),
        }

        def reader() -> None:
            while not stop.is_set():
                with order:
                    try:
                        unit = to_read.get_nowait()
                    except queue.Empty:
                        return
                    if not self.window.acquire(self.cost(unit), stop):
                        return
                began = time.perf_counter()
                loaded = self.read(unit)
                size = sum(part.numel() for part in loaded)
                self.clocks["read"].add(time.perf_counter() - began, size)
                to_compute.put((unit, loaded))

        def computer() -> None:
            while (item := to_compute.get()) is not None and not stop.is_set():
                unit, loaded = item
                began = time.perf_counter()
                output, stats = self.compute(unit, loaded)
                size = sum(part.numel() for part in loaded)
                del item, loaded  # the window counts them until the write; the memory goes now
                self.clocks["compute"].add(time.perf_counter() - began, size)
                to_write.put((unit, output, stats))
                del output

        def writer() -> None:
            while (item := to_write.get()) is not None and not stop.is_set():
                unit, output, stats = item
                began = time.perf_counter()
                self.write(unit, output, stats)
                self.clocks["write"].add(time.perf_counter() - began, output.numel())
                del item, output
                self.window.release(self.cost(unit))
                finished.put((unit, stats))

        def guarded(work: Callable[[], None]) -> Callable[[], None]:
            def body() -> None:
                try:
                    work()
                except BaseException as error:
                    finished.put(error)  # raised again in the calling thread
                    stop.set()

            return body

        stages = [(reader, self.readers), (computer, self.computers), (writer, self.writers)]
        threads = [
            threading.Thread(target=guarded(work), name=f"{work.__name__}-{i}", daemon=True)
            for work, count in stages
            for i in range(count)
        ]
        try:
            for thread in threads:
                thread.start()
            for _ in units:
                outcome = finished.get()
                if isinstance(outcome, BaseException):
                    raise outcome
                if self.on_done is not None:
                    self.on_done(*outcome)
        finally:
            stop.set()
            for _ in threads:
                to_compute.put(None)
                to_write.put(None)
            for thread in threads:
                if thread.ident is not None:  # started: an interrupt may come in between
                    thread.join()
