"""Threads that decompose matrices side by side, as many as memory holds matrices for."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from merge_cli.system.machine import free_memory, usable_cores

_MEMORY_SHARE = 0.5  # of the free memory
T = TypeVar("T")
R = TypeVar("R")


def threads_for(shapes: Iterable[Sequence[int]], requested: int | None = None) -> int:
    """How many threads can each decompose the largest matrix, at most one for each core.

    Args:
        shapes: of the matrices [rows, columns].
        requested: threads, instead of one for each core.
    """
    # The matrix and what it is made of in float32; its Gram matrix, vectors and workspace in
    # float64.
    bytes_each = max(
        (8 * rows * columns + 32 * min(rows, columns) ** 2 for rows, columns in shapes), default=1
    )
    fitting = int(free_memory() * _MEMORY_SHARE) // bytes_each
    return max(1, min(requested or usable_cores(), fitting))


@contextmanager
def in_threads(
    work: Callable[[T], R], items: Iterable[T], count: int
) -> Iterator[Iterator[tuple[T, R]]]:
    """Pairs of an item and its result, in order; only a few results wait to be taken.

    Leaving early lets the threads finish their current items.
    """
    pool = ThreadPoolExecutor(count)

    def pairs() -> Iterator[tuple[T, R]]:
        waiting: deque[tuple[T, Future[R]]] = deque()
        for item in items:
            waiting.append((item, pool.submit(work, item)))
            if len(waiting) > 2 * count:
                first, future = waiting.popleft()
                yield first, future.result()
        for first, future in waiting:
            yield first, future.result()

    try:
        yield pairs()
    finally:
        pool.shutdown(cancel_futures=True)
