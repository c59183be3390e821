"""Threads that share work: results in order, errors once, nobody left behind."""

from __future__ import annotations

import queue
import threading
import time
from contextlib import nullcontext
from typing import Any, cast

import pytest

from merge_cli.engine.files import StageClock
from merge_cli.engine.pool import Pool


class NoFiles:
    """A worker without files."""

    block = 1

    def __init__(self, number: int = 0) -> None:
        self.clock, self.closed = StageClock(), False

    def active(self) -> Any:
        return nullcontext()

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_nested_results_are_in_order(threads: int) -> None:
    with Pool(cast(Any, NoFiles), threads) as pool:

        def inner(number: int) -> list[int]:
            return pool.map(lambda i: number * 100 + i, range(number % 4))

        assert pool.map(inner, range(50)) == [
            [number * 100 + i for i in range(number % 4)] for number in range(50)
        ]
    assert all(cast(NoFiles, worker).closed for worker in pool.workers)


def test_idle_threads_help_with_what_is_left() -> None:
    together = threading.Barrier(3)
    with Pool(cast(Any, NoFiles), 3) as pool:
        # one job, whose three parts can only end if three threads work on them at once
        done = pool.map(lambda job: pool.map(lambda part: together.wait(10), range(3)), [0])
    assert sorted(done[0]) == [0, 1, 2]


def test_whole_jobs_come_before_parts_of_others() -> None:
    order: list[str] = []
    first_is_split = threading.Event()
    with Pool(cast(Any, NoFiles), 2) as pool:

        def job(number: int) -> None:
            order.append(f"job {number}")
            if number == 0:
                first_is_split.set()
                pool.map(lambda part: time.sleep(0.01), range(20))
            else:
                first_is_split.wait(10)

        pool.map(job, range(4))
    assert order == [f"job {i}" for i in range(4)]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("nested", [False, True])
def test_an_error_is_told_at_once_and_ends_everything(threads: int, nested: bool) -> None:
    before = threading.active_count()
    messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
    begun: list[int] = []

    def work(number: int) -> None:
        begun.append(number)
        if number == 7:
            raise ValueError("seven")

    with Pool(cast(Any, NoFiles), threads) as pool:
        if nested:
            pool.start(lambda job: pool.map(work, range(1000)), [0], messages)
        else:
            pool.start(work, range(1000), messages)
        error = messages.get(timeout=10)
    assert isinstance(error, ValueError)
    assert messages.empty()
    assert len(begun) < 1000
    assert threading.active_count() == before


def test_leaving_stops_threads_between_parts() -> None:
    begun: list[int] = []
    started = threading.Event()

    def part(number: int) -> None:
        begun.append(number)
        started.set()
        time.sleep(0.01)

    with Pool(cast(Any, NoFiles), 2) as pool:
        pool.start(lambda job: pool.map(part, range(1000)), [0, 1], queue.SimpleQueue())
        started.wait(10)
    assert len(begun) < 1000


def test_nothing_to_do() -> None:
    messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
    with Pool(cast(Any, NoFiles), 2) as pool:
        assert pool.map(str, []) == []
        pool.start(str, [], messages)
        assert messages.get(timeout=1) is None


def test_time_is_counted_once() -> None:
    with Pool(cast(Any, NoFiles), 2) as pool:
        pool.map(lambda job: pool.map(lambda part: time.sleep(0.02), range(4)), range(2))
    total = sum(worker.clock.compute + worker.clock.waited for worker in pool.workers)
    assert 0.16 <= total < 0.6  # eight parts of 0.02 s, not once more for the jobs around them


def test_a_thread_makes_its_buffers_once() -> None:
    """Else every block has new ones: all that was read stays in memory."""
    made: list[int] = []

    def context(number: int) -> Any:
        made.append(number)
        return NoFiles(number)

    seen: set[int] = set()
    with Pool(context, 2) as pool:
        pool.map(lambda item: seen.add(id(pool.worker)), range(200))
        assert len(made) == len(pool.workers) == len(set(made)) <= 3
        assert seen <= {id(worker) for worker in pool.workers}
        assert pool.worker is pool.worker
