"""Processes that answer jobs: what is done where the cluster has less room than it had."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from merge_cli.cluster import actors
from merge_cli.cluster.actors import ActorPool, Resources
from merge_cli.options import ignore_progress


@dataclass(eq=False)
class Call:
    actor: Any
    method: str
    given: tuple[Any, ...]


@dataclass(eq=False)
class Process:
    """An actor's handle. It has started where there was room for it."""

    worker: Any
    has_started: bool

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *given: Call(self, name, given))


@dataclass
class Cluster:
    """Stands in for the module `ray`: a cluster with room for so many processes of one CPU.

    Attributes:
        waiting: how many processes were asked for where there was no room.
    """

    room: int
    running: list[Process] = field(default_factory=list)
    waiting: int = 0

    exceptions = SimpleNamespace(RayTaskError=TypeError, RayError=ValueError)

    def put(self, value: Any) -> Any:
        return value

    def remote(self, **_: Any) -> Any:
        def start(make: Any, around: Any) -> Process:
            process = Process(make(ignore_progress), len(self.running) < self.room)
            if process.has_started:
                self.running.append(process)
            else:
                self.waiting += 1
            return process

        return lambda kind: SimpleNamespace(remote=start)

    def wait(self, calls: Sequence[Call], **_: Any) -> tuple[list[Call], list[Call]]:
        return [call for call in calls if call.actor.has_started], []

    def get(self, call: Call) -> Any:
        return call.actor.worker.answer(*call.given) if call.method == "answer" else []

    def kill(self, process: Process) -> None:
        if process in self.running:
            self.running.remove(process)

    def available_resources(self) -> dict[str, float]:
        return {"CPU": float(self.room - len(self.running)), "memory": 1e9}


class Squares:
    def answer(self, job: int) -> int:
        return job * job


def in_turns(sizes: Sequence[int], answered: list[int]) -> Iterator[int | None]:
    """Jobs of which those of a turn wait for all of the turn before."""
    done = 0
    for size in sizes:
        yield from range(done, done + size)
        done += size
        while len(answered) < done:
            yield None


@pytest.mark.parametrize("room", [1, 2, 3])
def test_what_finds_no_room_is_waited_for_once(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actors, "_START_SECONDS", 0.0)
    cluster, answered = Cluster(room), list[int]()
    pool: ActorPool[int, int] = ActorPool(
        cluster, lambda _: Squares(), Resources(1, 0, 10), 3, ignore_progress
    )
    for job, answer in pool.run(in_turns([3, 3, 3, 3], answered)):
        assert answer == job * job
        answered.append(job)
    assert sorted(answered) == list(range(12))
    assert cluster.waiting <= 3 - room
    assert len(cluster.running) == room
    cluster.room = 3  # others have left, or a node is back
    answered.clear()
    for job, _ in pool.run(in_turns([3, 3], answered)):
        answered.append(job)
    assert len(cluster.running) == 3
    assert cluster.waiting <= 3 - room
    pool.close()
    assert not cluster.running
