"""Processes on a Ray cluster that answer one job after the other, each with what a job needs.

What takes long to set up, such as a loaded model, is set up once in each. A process that is lost,
alone or with its node, is replaced, and its job is done again: so a job may be done twice, and must
not mind.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from merge_cli.cluster.connection import Node, Surroundings, reason
from merge_cli.errors import Interrupted, MergeCliError, ResourceError
from merge_cli.options import OnProgress, Progress
from merge_cli.system.machine import show_size

_POLL_SECONDS = 0.5
_START_SECONDS = 10.0  # for a process to start; then its job goes to one that is free, if any is
_PATIENCE = 60.0  # for the first process to start, before the user is told that it waits
_STOP_SECONDS = 10.0
_ATTEMPTS = 3  # processes that a job may lose, before it is the job that is suspected

Job = TypeVar("Job")
Answer = TypeVar("Answer")
JobOf = TypeVar("JobOf", contravariant=True)
AnswerOf = TypeVar("AnswerOf", covariant=True)


class Worker(Protocol[JobOf, AnswerOf]):
    """Answers jobs, in a process of its own."""

    def answer(self, job: JobOf) -> AnswerOf: ...


@dataclass(frozen=True)
class Resources:
    """What each process reserves on its node: CPUs, GPUs, bytes of memory (0: none)."""

    cpus: int
    gpus: int
    memory: int

    def fit(self, node: Node) -> int:
        """How many of these processes a node has room for."""
        pairs = (node.cpus, self.cpus), (node.memory, self.memory), (node.gpus, self.gpus)
        return min(there // needed for there, needed in pairs if needed)

    def __str__(self) -> str:
        """In words."""
        parts = [f"{self.cpus} CPU{'s' * (self.cpus > 1)}"]
        parts += [f"{self.gpus} GPU"] if self.gpus else []
        memory = [f" and {show_size(self.memory)} of memory"] if self.memory else []
        return ", ".join(parts) + "".join(memory)


def room_for(nodes: Sequence[Node], resources: Resources) -> int:
    """How many processes the nodes have room for, if nobody else is there.

    Raises:
        ResourceError: none. Ray would wait for ever.
    """
    count = sum(resources.fit(node) for node in nodes)
    if not count:
        hint = "Give fewer --threads, or start nodes with more memory (`ray start --memory=BYTES`)."
        raise ResourceError(f"no node of the Ray cluster has {resources}", hint=hint)
    return count


class _Actor:
    """The process. `answer` runs in one thread, what asks how it goes in the other."""

    def __init__(
        self, make: Callable[[OnProgress], Worker[Any, Any]], around: Surroundings
    ) -> None:
        around.take()
        self._make = make
        self._worker: Worker[Any, Any] | None = None
        self._stopping, self._lock = threading.Event(), threading.Lock()
        self._news: list[Progress] = []

    def host(self) -> str:
        """Where it is."""
        return socket.gethostname()

    def answer(self, job: Any) -> Any:
        """The worker's answer, or its error, which so arrives as what it is."""
        try:
            self._worker = self._worker or self._make(self._hear)
            return self._worker.answer(job)
        except MergeCliError as error:
            return error

    def news(self) -> list[Progress]:
        """What the worker has said since the last call: all notes, and of each stage the latest."""
        with self._lock:
            news, self._news = self._news, []
        return news

    def stop(self) -> None:
        """End the job soon: when the worker next says how far it is."""
        self._stopping.set()

    def _hear(self, progress: Progress) -> None:
        if self._stopping.is_set():
            raise Interrupted("stopped")
        with self._lock:
            if progress.total:
                self._news = [p for p in self._news if not p.total or p.stage != progress.stage]
            self._news.append(progress)


@dataclass
class _Assignment(Generic[Job]):
    """A job, and who does it.

    Attributes:
        attempts: processes that have had it.
        actor: the process that has it now.
        starting: the call that a new process answers when it has started.
        since: when it was given the job.
    """

    job: Job
    attempts: int = 0
    actor: Any = None
    starting: Any = None
    since: float = 0.0


class ActorPool(Generic[Job, Answer]):
    """Up to `count` processes, which are started when there are jobs for them.

    Args:
        make: makes what answers jobs, in each process; it is sent there.
        on_progress: of all of them.
        failed: failed(job, why) is the answer of a job that has failed; by default it is an error.
    """

    def __init__(
        self,
        ray: Any,
        make: Callable[[OnProgress], Worker[Job, Answer]],
        resources: Resources,
        count: int,
        on_progress: OnProgress,
        *,
        failed: Callable[[Job, str], Answer] | None = None,
    ) -> None:
        self._ray, self.count, self._on_progress = ray, count, on_progress
        self._failed = failed
        self._resources, self._make, self._around = resources, ray.put(make), Surroundings.here()
        self._remote = ray.remote(
            num_cpus=resources.cpus,
            num_gpus=resources.gpus,
            memory=resources.memory or None,
            max_concurrency=2,  # one for `answer`, one for `news` and `stop`
            max_restarts=0,
        )(_Actor)
        self._idle: list[Any] = []
        self._busy: dict[Any, _Assignment[Job]] = {}  # by the call that answers
        self._again: list[_Assignment[Job]] = []
        self._asked: dict[Any, Any] = {}  # calls of `news` -> the actor
        self._room = count  # for so many processes, as far as is known
        self._began = time.monotonic()
        self._answered = False

    def run(self, jobs: Iterator[Job | None]) -> Iterator[tuple[Job, Answer]]:
        """Each job with its answer, as they come.

        Args:
            jobs: the next one is taken when a process is free; None where there is none before
                another one is answered.

        Raises:
            MergeCliError: as the worker does.
            ResourceError: a job has failed, or lost several processes; not where `failed` answers.
        """
        while True:
            self._take_from_waiting()
            self._give(jobs)
            if not self._busy:
                return
            ready, _ = self._ray.wait([*self._busy], timeout=_POLL_SECONDS)
            self._pass_news()
            for call in ready:
                assignment = self._busy.pop(call)
                try:
                    answer = self._ray.get(call)
                except self._ray.exceptions.RayTaskError as error:
                    self._idle.append(assignment.actor)  # it lives
                    message = f"a process on the Ray cluster failed: {reason(error)}"
                    answer = self._answer_of_failed(assignment.job, message, error)
                except self._ray.exceptions.RayError as error:
                    self._ray.kill(assignment.actor)
                    if assignment.attempts < _ATTEMPTS:
                        self._do_again(assignment, error)
                        continue
                    lost = f"{assignment.job} has lost {_ATTEMPTS} processes: {reason(error)}"
                    hint = f"Each of them had {self._resources}."
                    answer = self._answer_of_failed(assignment.job, lost, error, hint)
                else:
                    self._idle.append(assignment.actor)
                    if isinstance(answer, MergeCliError):
                        raise answer
                self._answered = True
                yield assignment.job, answer

    def stop(self) -> None:
        """End what is being done soon, let it keep what it keeps, and end all processes."""
        try:
            for assignment in self._busy.values():
                assignment.actor.stop.remote()
            if calls := [*self._busy]:
                self._ray.wait(calls, num_returns=len(calls), timeout=_STOP_SECONDS)
        finally:
            self.close()

    def close(self) -> None:
        """End all processes; the next `run` starts others."""
        for actor in (*self._idle, *(assignment.actor for assignment in self._busy.values())):
            self._ray.kill(actor)
        self._idle, self._busy, self._again, self._asked = [], {}, [], {}

    def _give(self, jobs: Iterator[Job | None]) -> None:
        while len(self._busy) < self.count and (self._idle or self._has_room()):
            if self._again:
                assignment = self._again.pop()
            elif (job := next(jobs, None)) is not None:
                assignment = _Assignment(job)
            else:
                return
            assignment.attempts += 1
            assignment.since, assignment.starting = time.monotonic(), None
            if self._idle:
                assignment.actor = self._idle.pop()
            else:
                assignment.actor = self._remote.remote(self._make, self._around)
                assignment.starting = assignment.actor.host.remote()
            self._busy[assignment.actor.answer.remote(assignment.job)] = assignment

    def _has_room(self) -> bool:
        """Whether one more process would find room: as far as is known, or as Ray says."""
        if len(self._busy) + len(self._idle) < self._room:
            return True
        free, needed = self._ray.available_resources(), self._resources
        required = {"CPU": needed.cpus, "GPU": needed.gpus, "memory": needed.memory}
        return all(free.get(kind, 0) >= amount for kind, amount in required.items())

    def _take_from_waiting(self) -> None:
        """Give jobs of processes that find no room to those that have nothing to do.

        Where a node is lost, or others use the cluster, there is less room than there was: no
        further job waits for it.
        """
        for call, assignment in [*self._busy.items()]:
            if len(self._again) >= len(self._idle):
                return
            waited = time.monotonic() - assignment.since
            if assignment.starting is None or waited < _START_SECONDS:
                continue
            if not self._ray.wait([assignment.starting], timeout=0)[0]:
                self._ray.kill(assignment.actor)
                del self._busy[call]
                assignment.attempts -= 1
                self._again.append(assignment)
                self._room = len(self._busy) + len(self._idle)

    def _do_again(self, assignment: _Assignment[Job], error: Exception) -> None:
        note = f"a process was lost, another one does {assignment.job} again: {reason(error)}"
        self._on_progress(Progress("cluster", 0, 0, note))
        self._again.append(assignment)

    def _answer_of_failed(self, job: Job, why: str, error: Exception, hint: str = "") -> Answer:
        if self._failed is None:
            raise ResourceError(why, hint=hint) from error
        return self._failed(job, why)

    def _pass_news(self) -> None:
        """Say what the processes have said since the last time."""
        waiting = {id(actor) for actor in self._asked.values()}
        for assignment in self._busy.values():
            if id(assignment.actor) not in waiting:
                self._asked[assignment.actor.news.remote()] = assignment.actor
        ready, _ = self._ray.wait([*self._asked], num_returns=len(self._asked), timeout=0)
        for call in ready:
            del self._asked[call]
            try:
                news = self._ray.get(call)
            except self._ray.exceptions.RayError:
                continue  # it is lost, which its answer says, too
            self._answered = True
            for progress in news:
                self._on_progress(progress)
        if not self._answered and time.monotonic() - self._began > _PATIENCE:
            self._answered = True  # said once
            note = f"waiting for {self._resources} to be free on the Ray cluster"
            self._on_progress(Progress("cluster", 0, 0, note))
