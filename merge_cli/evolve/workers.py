"""Workers that evaluate candidates: this process, several processes, or actors of a Ray cluster.

All give the same outcomes for the same jobs, in different order. Each process or actor loads the
model once, an actor on its own GPU if there is one. On a cluster the recipe's models must have the
same paths on every node. A lost actor is replaced, and its job repeated: see `cluster.actors`.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

from merge_cli.cluster.actors import ActorPool, Resources
from merge_cli.errors import MergeCliError, ResourceError, SourceError
from merge_cli.evolve.evaluator import Evaluator
from merge_cli.evolve.jobs import EvaluationJob, EvaluationOutcome, Setup
from merge_cli.options import OnProgress, ignore_progress
from merge_cli.recipe.search import Search
from merge_cli.system.processes import end_with

_LOST = "the worker process ended (exit code {}), perhaps for want of memory"


class Workers(Protocol):
    """Evaluates jobs."""

    def run(self, jobs: Iterable[EvaluationJob]) -> Iterator[EvaluationOutcome]:
        """Outcomes as they are ready; the next job is taken when a worker is free."""

    def close(self) -> None:
        """Free models and processes."""


def make_workers(search: Search, setup: Setup) -> Workers:
    """The recipe's kind and number of workers; those of a cluster where the merge has one."""
    if search.engine == "ray" or setup.options.ray is not None:
        # Who proposes one by one may propose otherwise with more workers; a generation is the same.
        counts = search.engine == "ray" or search.asynchronous or search.optimizer == "tpe"
        return RayWorkers(setup, search.workers if counts or "workers" in search.given else None)
    return InProcess(setup) if search.workers == 1 else Processes(setup, search.workers)


class InProcess:
    """Evaluates in this process; the model is loaded with the first job."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._evaluator: Evaluator | None = None

    def run(self, jobs: Iterable[EvaluationJob]) -> Iterator[EvaluationOutcome]:
        for job in jobs:
            if self._evaluator is None:
                self._evaluator = Evaluator(self._setup)
            yield self._evaluator.answer(job)

    def close(self) -> None:
        if self._evaluator is not None:
            self._evaluator.close()
            self._evaluator = None


class Processes:
    """A pool of processes; one that dies is replaced, and its job has failed."""

    def __init__(self, setup: Setup, count: int) -> None:
        self._setup, self._count = setup, count
        self._context = multiprocessing.get_context("spawn")
        self._workers: dict[Connection, Any] = {}

    def run(self, jobs: Iterable[EvaluationJob]) -> Iterator[EvaluationOutcome]:
        upcoming = iter(jobs)
        busy: dict[Connection, EvaluationJob] = {}
        while True:
            while len(busy) < self._count and (job := next(upcoming, None)) is not None:
                pipe = next((p for p in self._workers if p not in busy), None) or self._start()
                busy[pipe] = job
                with contextlib.suppress(OSError):  # it has died: `wait` reports it
                    pipe.send(job)
            if not busy:
                return
            for ready in wait(list(busy)):
                pipe = next(p for p in busy if p is ready)
                job = busy.pop(pipe)
                try:
                    answer = pipe.recv()
                except (EOFError, ConnectionResetError):
                    process = self._workers.pop(pipe)
                    process.join()
                    pipe.close()
                    yield EvaluationOutcome(job.number, error=_LOST.format(process.exitcode))
                    continue
                if isinstance(answer, BaseException):
                    raise answer
                yield answer

    def close(self) -> None:
        for pipe, process in self._workers.items():
            pipe.close()
            process.terminate()
            process.join()
        self._workers.clear()

    def _start(self) -> Connection:
        connection, child_end = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(child_end, self._setup), daemon=True)
        process.start()
        child_end.close()
        self._workers[connection] = process
        return connection


def _serve(pipe: Connection, setup: Setup) -> None:
    """The loop of a worker process: receive jobs and send outcomes until the pipe closes."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # a terminal interrupts all processes; the parent ends this one
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None:
        end_with(parent.pid, parent.sentinel)
    evaluator: Evaluator | None = None
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        try:
            evaluator = evaluator or Evaluator(setup)
            answer: EvaluationOutcome | MergeCliError = evaluator.answer(job)
        except MergeCliError as error:  # no candidate can be evaluated: the search reports it
            answer = portable(error)
        pipe.send(answer)
        if isinstance(answer, MergeCliError):
            return


def portable(error: MergeCliError) -> MergeCliError:
    """An error that can be sent to another process: its text, and whether an input caused it."""
    return (SourceError if isinstance(error, SourceError) else MergeCliError)(str(error))


class RayWorkers:
    """Up to `count` actors on the cluster of the merge, else of RAY_ADDRESS, else started here.

    Args:
        count: None for as many as the cluster has room for.
    """

    def __init__(self, setup: Setup, count: int | None) -> None:
        import ray

        self._ray = ray
        self._started = not ray.is_initialized()
        if self._started:
            ray.init(configure_logging=False, include_dashboard=False, log_to_driver=False)
        resources = ray.cluster_resources()
        gpus = resources.get("GPU", 0) > 0 and setup.options.device != "cpu"
        # Ray would wait forever for an actor that the cluster has no resources for.
        room = int(resources.get("GPU" if gpus else "CPU", 0))
        if not room:
            raise ResourceError("the Ray cluster has no CPU for a worker")
        options = replace(setup.options, device="cuda" if gpus else "cpu")
        splits = {
            name: replace(split, spec=split.spec.changed(device=options.device))
            for name, split in setup.objective.splits.items()
        }
        there = replace(setup, options=options, objective=replace(setup.objective, splits=splits))
        self.pool: ActorPool[EvaluationJob, EvaluationOutcome] = ActorPool(
            ray,
            partial(_evaluator, there),
            Resources(1, int(gpus), 0),
            room if count is None else min(count, room),
            ignore_progress,
            failed=lambda job, why: EvaluationOutcome(job.number, error=why),
        )

    def run(self, jobs: Iterable[EvaluationJob]) -> Iterator[EvaluationOutcome]:
        for _, outcome in self.pool.run(iter(jobs)):
            yield outcome

    def close(self) -> None:
        self.pool.close()
        if self._started:
            self._ray.shutdown()


def _evaluator(setup: Setup, on_progress: OnProgress) -> Evaluator:
    """What evaluates in an actor; the search says how far it is."""
    return Evaluator(setup)
