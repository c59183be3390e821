"""Threads that share work: tensors first, largest first; then the chunks of what is left.

A job may split itself with `map`. Its own thread works the items off; others join in once there are
no whole jobs left to begin, so that many tensors go to many threads, and the last, large one to all
of them. Which thread does what never changes a result.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any, Generic, TypeVar, cast

from merge_cli.engine.device import Device, choose_arithmetic
from merge_cli.engine.files import Files
from merge_cli.engine.memory import WorkerMemory
from merge_cli.engine.worker_context import HostWorker, TorchWorker, WorkerContext
from merge_cli.errors import ResourceError
from merge_cli.planning.plan import Plan
from merge_cli.system.libraries import require
from merge_cli.system.machine import torch_threads
from merge_cli.system.notices import say_once

I = TypeVar("I")  # noqa: E741  # Items; the name is never seen alone
R = TypeVar("R")
Messages = queue.SimpleQueue[Any]


class _Stopped(BaseException):
    """Raised in a worker that waits for others when everything ends."""


class _Batch(Generic[I, R]):
    """Items that threads take one by one; guarded by the pool's condition."""

    def __init__(
        self,
        work: Callable[[I], R],
        items: Sequence[I],
        ended: Callable[[BaseException | None], None] = lambda error: None,
    ) -> None:
        self.work, self.items, self.ended = work, items, ended
        self.results: list[Any] = [None] * len(items)
        self.next, self.left = 0, len(items)
        self.error: BaseException | None = None

    def fail(self, error: BaseException) -> None:
        """Keep the first error, and report it at once; items that nobody has begun are dropped."""
        # Later errors are mostly consequences of the first: a device that has gone, a full disk.
        if self.error is None:
            self.error = error
            self.ended(error)
        self.left -= len(self.items) - self.next
        self.next = len(self.items)


class Pool:
    """A context manager: threads inside, none outside.

    Args:
        make_context: makes what a thread works with (its buffers, its stream).
        threads: how many threads; the calling one only waits.
    """

    def __init__(self, make_context: Callable[[int], WorkerContext], threads: int) -> None:
        self._make_context, self.threads = make_context, threads
        self._changed = threading.Condition()
        self._batches: list[_Batch[Any, Any]] = []  # the oldest first
        self._stopping = False
        self._local = threading.local()
        self.workers: list[WorkerContext] = []
        self._threads = [
            threading.Thread(target=self._worker, name=f"merge-{i}", daemon=True)
            for i in range(threads)
        ]

    def __enter__(self) -> Pool:
        """Start the threads, or as many as the system lets us.

        Raises:
            ResourceError: not even one.
        """
        for number, worker in enumerate(self._threads):
            try:
                worker.start()
            except RuntimeError as error:  # "can't start new thread"
                if number == 0:
                    hint = "Raise the limit: ulimit -u."
                    raise ResourceError("no thread can be started", hint=hint) from error
                self._threads, self.threads = self._threads[:number], number
                say_once(f"only {number} threads could be started")
                break
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Also after an error or Ctrl-C: no thread may touch buffers or files that are about to go.
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        for worker in self._threads:
            if worker.ident is not None:
                worker.join()
        for context in self.workers:
            context.close()

    @property
    def worker(self) -> WorkerContext:
        """The calling thread's own."""
        if not hasattr(self._local, "worker"):
            with self._changed:
                context = self._make_context(len(self.workers))
                self.workers.append(context)
            self._local.worker = context
        return cast(WorkerContext, self._local.worker)

    def map(self, work: Callable[[I], R], items: Sequence[I]) -> list[R]:
        """work(item) for every item, by any thread; results in the items' order.

        Raises:
            the first error of any item, when those that were begun have ended.
        """
        is_worker = threading.current_thread() in self._threads
        if is_worker and (len(items) == 1 or self.threads == 1):
            return [self._alone(work, item) for item in items]
        batch = _Batch(work, items)
        # Behind the batches that wait already: whoever is free begins a whole job before it helps
        # with a part of another, so that few threads ever wait for the same tensor.
        with self._changed:
            self._batches.append(batch)
            self._changed.notify_all()
        # This thread works its own parts off instead of waiting: with every thread in `map` at
        # once nobody would be left to work, and the merge would stand still.
        while is_worker and (index := self._take(batch)) is not None:
            self._execute(batch, index)
        began = time.perf_counter()
        # All items are taken; others may still be at some. A pool that stops never finishes them,
        # and this thread has to end, too.
        with self._changed:
            while batch.left:
                if self._stopping:
                    raise _Stopped
                self._changed.wait()
        if is_worker:
            self.worker.clock.waited += time.perf_counter() - began
        if batch.error is not None:
            raise batch.error
        return batch.results

    def start(self, work: Callable[[I], object], items: Sequence[I], messages: Messages) -> None:
        """`map` without waiting: `messages` gets the first error, or None when all is done."""

        def ended(error: BaseException | None) -> None:
            messages.put(error)

        batch = _Batch(work, items, ended)
        if not items:
            ended(None)
            return
        with self._changed:
            self._batches.append(batch)
            self._changed.notify_all()

    def _alone(self, work: Callable[[I], R], item: I) -> R:
        if self._stopping:
            raise _Stopped
        return work(item)

    def _worker(self) -> None:
        with self.worker.active():
            self._work()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._batches and not self._stopping:
                    self._changed.wait()
                if self._stopping:
                    return
                batch = self._batches[0]  # the oldest: whole jobs, before parts of them
            index = self._take(batch)
            if index is not None:
                self.worker.clock.measure(partial(self._execute, batch, index))

    def _take(self, batch: _Batch[Any, Any]) -> int | None:
        """The number of an item that nobody has begun; forgets a batch without any."""
        with self._changed:
            if self._stopping:
                return None
            index = batch.next if batch.next < len(batch.items) else None
            batch.next += index is not None
            if batch.next >= len(batch.items) and batch in self._batches:
                self._batches.remove(batch)
            return index

    def _execute(self, batch: _Batch[Any, Any], index: int) -> None:
        try:
            batch.results[index] = batch.work(batch.items[index])
        except _Stopped:
            pass  # not an error of this item: everything ends
        except BaseException as error:  # raised again where `map` was called
            with self._changed:
                batch.fail(error)
        with self._changed:
            batch.left -= 1
            if batch.left == 0:
                self._changed.notify_all()
                if batch.error is None:
                    batch.ended(None)


def arithmetic_for(plan: Plan, device: Device) -> tuple[str, str]:
    """What computes, and why nothing faster does.

    Raises:
        ResourceError: torch has to, and cannot be imported.
    """
    if device.kind == "cpu":
        arithmetic, why = choose_arithmetic(plan)
        if arithmetic == "torch":
            require("torch", f"this merge ({why})")
        return arithmetic, why
    from merge_cli.kernels.backend import missing

    why = missing()
    return ("torch", why) if why else ("triton", "")


def worker_factory(
    files: Files, device: Device, arithmetic: str, room: WorkerMemory
) -> Callable[[int], WorkerContext]:
    """What makes the pool's workers. Devices take turns."""
    if device.kind == "cuda":
        from merge_cli.engine.device_worker import cuda_worker

        return lambda number: cuda_worker(
            files, device.indexes[number % len(device.indexes)], room.block
        )
    kind = HostWorker if arithmetic == "compiled" else TorchWorker
    return lambda number: kind(files, room.block, room.inputs)


@contextmanager
def one_torch_thread(device: Device, arithmetic: str) -> Iterator[None]:
    """Blocks are the parallelism here; torch's own threads would fight over the same cores."""
    if device.kind == "cpu" and arithmetic == "compiled":
        yield
        return
    with torch_threads(1):
        yield


@contextmanager
def memory_errors(*, resumes: bool = True) -> Iterator[None]:
    """Say in our own words that memory ran out, on the host or on the device."""
    hint = "Use less memory: a lower --max-memory, fewer --threads, or --device cpu."
    hint += " The same command resumes." if resumes else ""
    try:
        yield
    except MemoryError as error:
        raise ResourceError("memory ran out", hint=hint) from error
    except RuntimeError as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which may not be imported
            raise ResourceError("the device's memory ran out", hint=hint) from error
        if "can't allocate memory" not in str(error):
            raise
        raise ResourceError("memory ran out", hint=hint) from error
