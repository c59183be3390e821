"""Who evaluates: this process, or several, each with a model of its own.

All of them answer the same jobs with the same numbers; only the order of the answers differs.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

from merge_cli.errors import MergeCliError, SourceError
from merge_cli.evolve.evaluator import EvaluationJob, EvaluationOutcome, Evaluator, Setup
from merge_cli.lifeline import end_with
from merge_cli.recipe.search import Search

_LOST = "the worker process ended (exit code {}), perhaps for want of memory"


class Workers(Protocol):
    """What evaluates jobs."""

    def run(self, jobs: Iterable[EvaluationJob]) -> Iterator[EvaluationOutcome]:
        """Every job's outcome, as they come; a job is taken when somebody is free for it."""

    def close(self) -> None:
        """Let go of models and processes."""


def make_workers(search: Search, setup: Setup) -> Workers:
    """As the recipe asks for."""
    if search.engine == "ray":
        from merge_cli.evolve.ray_workers import RayWorkers

        return RayWorkers(setup, search.workers)
    return InProcess(setup) if search.workers == 1 else Processes(setup, search.workers)


class InProcess:
    """One after the other, here. The model is loaded with the first job."""

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
    """A pool: each process loads the model once. One that dies is replaced, its job failed."""

    def __init__(self, setup: Setup, count: int) -> None:
        self._setup, self._count = setup, count
        self._context = multiprocessing.get_context("spawn")
        self._workers: dict[Connection, Any] = {}

    def run(self, jobs: Iterable[EvaluationJob]) -> Iterator[EvaluationOutcome]:
        coming = iter(jobs)
        busy: dict[Connection, EvaluationJob] = {}
        while True:
            while len(busy) < self._count and (job := next(coming, None)) is not None:
                pipe = next((p for p in self._workers if p not in busy), None) or self._start()
                busy[pipe] = job
                with contextlib.suppress(OSError):  # it has died: told when it is waited for
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
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs, self._setup), daemon=True)
        process.start()
        theirs.close()
        self._workers[ours] = process
        return ours


def _serve(pipe: Connection, setup: Setup) -> None:
    """A worker process: jobs in, outcomes out, until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal tells all processes; ours ends us
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
        except MergeCliError as error:  # no candidate can be evaluated: the search's to tell
            answer = portable(error)
        pipe.send(answer)
        if isinstance(answer, MergeCliError):
            return


def portable(error: MergeCliError) -> MergeCliError:
    """An error as another process can be told of it: its text, and whether it is of an input."""
    return (SourceError if isinstance(error, SourceError) else MergeCliError)(str(error))
