"""Makes what a step merges, in memory, and measures it: one model at a time.

It runs in the process of the command, or in several on the nodes of a cluster (`workers.py`), which
share OUT.auto and the cache.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from merge_cli.auto.measure import Losses, measure
from merge_cli.auto.rows import Parts
from merge_cli.calibration.run import calibrate
from merge_cli.dam.run import learn
from merge_cli.errors import NonFiniteError
from merge_cli.evolve.mergeable import MergeableModel
from merge_cli.options import MergeOptions, OnProgress, Progress
from merge_cli.planning.plan import Plan
from merge_cli.planning.planner import make_plan
from merge_cli.system.machine import torch_threads

_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Setup:
    """What a worker needs; it can be sent to another process.

    Attributes:
        soup: the plan of the uniform soup, with all of the sources.
        parts: the rows of each source.
        folder: what learning keeps, until the model is published.
        sharing: workers on one machine.
    """

    soup: Plan
    parts: tuple[Parts, ...]
    folder: Path
    options: MergeOptions
    sharing: int = 1


@dataclass(frozen=True)
class Job:
    """One merge to make and to measure.

    Attributes:
        step: whose merge it is.
        method: fisher, regmean or dam where the plan lacks what these measure or learn first.
        part: of the rows; empty if it is only to be made.
        weights: of a candidate of the search.
    """

    step: str
    plan: Plan
    method: str
    part: str
    weights: tuple[float, ...] = ()

    def __str__(self) -> str:
        """For messages."""
        return f"a candidate of the {self.step}" if self.weights else f"step '{self.step}'"


@dataclass(frozen=True)
class Answer:
    """What has come of a job.

    Attributes:
        plan: complete: it merges what was measured.
        folders: that belong into OUT with it, by name.
        losses: empty where it predicts no numbers; then there is an `error`.
        seconds, cpu_seconds: that it took.
    """

    plan: Plan
    folders: Mapping[str, Path] = field(default_factory=dict)
    losses: Losses = field(default_factory=dict)
    error: str = ""
    seconds: float = 0.0
    cpu_seconds: float = 0.0


class StepWorker:
    """Makes merges and measures them."""

    def __init__(self, setup: Setup, on_progress: OnProgress) -> None:
        self._setup, self._on_progress = setup, on_progress
        self._model: MergeableModel | None = None

    def answer(self, job: Job) -> Answer:
        """Do a job.

        Raises:
            SourceError, ResourceError, Interrupted: as `calibrate` and `learn` do.
        """
        with torch_threads(self._setup.options.threads):
            # One model at a time in memory: the student of a training, or that of the merges.
            if job.method:
                self.close()
            elif job.part:
                self._live()
            began, cpu_began = time.monotonic(), time.process_time()
            try:
                plan, folders = self._prepared(job)
                losses = self._losses(plan, job.part) if job.part else {}
                answer = Answer(plan, folders, losses)
            except NonFiniteError as refused:
                answer = Answer(job.plan, error=refused.message)
            seconds, cpu_seconds = time.monotonic() - began, time.process_time() - cpu_began
        return replace(answer, seconds=seconds, cpu_seconds=cpu_seconds)

    def close(self) -> None:
        """Let go of the model in memory."""
        if self._model is not None:
            self._model.close()
            self._model = None

    def _live(self) -> MergeableModel:
        setup = self._setup
        if self._model is None:
            self._model = MergeableModel(
                setup.soup.recipe,
                setup.options,
                plan=setup.soup,
                workers=setup.sharing,
                device=setup.options.device,
                batch_tokens=_BATCH_TOKENS,
                seed=setup.soup.recipe.seed,
            )
        return self._model

    def _losses(self, plan: Plan, part: str) -> Losses:
        model = self._live()
        model.become(plan.recipe, plan)
        return {
            data.name: measure(model.live, getattr(data, part), data.name)
            for data in self._setup.parts
        }

    def _prepared(self, job: Job) -> tuple[Plan, dict[str, Path]]:
        """The plan with what it lacks."""
        plan, options = job.plan, self._setup.options
        if job.method in ("fisher", "regmean"):
            return calibrate(plan, options, self._on_progress), {}
        if job.method == "dam":
            learned = learn(plan, self._setup.folder, options, on_progress=self._of_learning)
            resolved = make_plan(learned.resolved(plan.recipe), shard_size=plan.shard_size)
            return resolved, learned.folders
        return plan, {}

    def _of_learning(self, progress: Progress) -> None:
        """How far learning is; what it says of its own worth is not the verdict here."""
        if progress.total:
            self._on_progress(progress)
