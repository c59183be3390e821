"""Who makes and measures merges: this process, or processes on the nodes of a Ray cluster.

All give the same answers to the same jobs, with the same number of threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Protocol

from merge_cli.auto.plan import AutomaticPlan
from merge_cli.auto.worker import Answer, Job, Setup, StepWorker
from merge_cli.engine.device import device_of
from merge_cli.options import MergeOptions, OnProgress, Progress
from merge_cli.planning.plan import Plan
from merge_cli.system.caches import cache_folder


class Workers(Protocol):
    """Does jobs; `count` of them at once."""

    @property
    def count(self) -> int: ...

    def run(self, jobs: Iterator[Job | None]) -> Iterator[tuple[Job, Answer]]:
        """Each job with its answer, as they come; None where none can begin before another ends."""

    def stop(self) -> None:
        """Give up what is being done; `run` can begin anew."""

    def close(self) -> None:
        """Free models and processes."""


class Here:
    """This process, one job after the other."""

    count = 1

    def __init__(self, setup: Setup, on_progress: OnProgress) -> None:
        self._worker = StepWorker(setup, on_progress)

    def run(self, jobs: Iterator[Job | None]) -> Iterator[tuple[Job, Answer]]:
        for job in jobs:
            assert job is not None, "everything before it is done"
            yield job, self._worker.answer(job)

    def stop(self) -> None:
        self.close()  # the model may be half another merge

    def close(self) -> None:
        self._worker.close()


@contextmanager
def workers_for(
    decided: AutomaticPlan,
    soup: Plan,
    folder: Path,
    options: MergeOptions,
    on_progress: OnProgress,
) -> Iterator[Workers]:
    """The workers that the options want.

    Args:
        soup: the plan of the uniform soup.
        folder: for what learning keeps.

    Raises:
        UsageError, ResourceError: the cluster cannot be reached, has no room for a model, or its
            nodes do not share the cache.
    """
    setup = Setup(soup, decided.parts, folder, options)
    if options.ray is None:
        workers = Here(setup, on_progress)
        try:
            yield workers
        finally:
            workers.close()
        return
    from merge_cli.cluster.actors import ActorPool, Resources, room_for
    from merge_cli.cluster.connection import BESIDE_A_MODEL, check_storage, connected, usable_nodes
    from merge_cli.cluster.node import SHARED_CACHE

    kind = device_of(options).kind
    with connected(options.ray) as ray:
        nodes = usable_nodes(ray, kind)
        smallest = min(node.cpus for node in nodes)
        cpus = 1 if kind == "cuda" else min(options.threads or smallest, smallest)
        memory = soup.bytes_written + BESIDE_A_MODEL
        resources = Resources(cpus, int(kind == "cuda"), memory)
        count = room_for(nodes, resources)
        if any(step.prepares for step in decided.steps):
            check_storage(ray, nodes, cache_folder().absolute(), hint=SHARED_CACHE)
        there = replace(
            setup,
            folder=folder.absolute(),
            options=replace(options, ray=None, device=kind, threads=cpus),
            sharing=max(resources.fit(node) for node in nodes),
        )
        note = f"trying merges on a Ray cluster, up to {count} at once, each with {resources}"
        on_progress(Progress("cluster", 0, 0, note))
        pool: ActorPool[Job, Answer] = ActorPool(
            ray, partial(StepWorker, there), resources, count, on_progress
        )
        try:
            yield pool
        finally:
            pool.close()
