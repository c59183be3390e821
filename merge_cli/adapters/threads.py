"""One function over many things by several threads, in the order of the things."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


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
