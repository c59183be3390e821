"""Matrices decomposed by several threads: how many there is memory for, and in which order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from merge_cli.machine import free_memory, usable_cores

_ROOM = 0.5  # of the free memory
T = TypeVar("T")
R = TypeVar("R")


def threads_for(shapes: Iterable[Sequence[int]], wanted: int | None = None) -> int:
    """As many as there are cores, or as wanted, of which each can decompose the largest matrix.

    Args:
        shapes: of the matrices [rows, columns].
    """
    # The matrix and what it is made of in float32; its Gram matrix, vectors and workspace in
    # float64.
    each = max(
        (8 * rows * columns + 32 * min(rows, columns) ** 2 for rows, columns in shapes), default=1
    )
    room = int(free_memory() * _ROOM) // each
    return max(1, min(wanted or usable_cores(), room))


@contextmanager
def in_threads(
    work: Callable[[T], R], things: Iterable[T], count: int
) -> Iterator[Iterator[tuple[T, R]]]:
    """Pairs of a thing and what `work` made of it; few wait to be taken.

    Leaving early lets the threads end with what they are at.
    """
    pool = ThreadPoolExecutor(count)

    def pairs() -> Iterator[tuple[T, R]]:
        waiting: deque[tuple[T, Future[R]]] = deque()
        for thing in things:
            waiting.append((thing, pool.submit(work, thing)))
            if len(waiting) > 2 * count:
                first, future = waiting.popleft()
                yield first, future.result()
        for first, future in waiting:
            yield first, future.result()

    try:
        yield pairs()
    finally:
        pool.shutdown(cancel_futures=True)
