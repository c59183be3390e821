"""From a recipe that leaves the method open to one that names it, step by step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from merge_cli.auto.checks import SOUP
from merge_cli.auto.measure import Losses, from_json, mean_loss, to_json
from merge_cli.auto.plan import AutomaticPlan, plan_automatic
from merge_cli.auto.trials import Trials
from merge_cli.auto.verdict import choose, judge, sentence
from merge_cli.auto.worker import Answer, Job
from merge_cli.auto.workers import Workers, workers_for
from merge_cli.auto.workspace import AutomaticWorkspace
from merge_cli.calibration.run import with_folder
from merge_cli.dam.distributed import launched
from merge_cli.engine.inputs import inputs_of
from merge_cli.errors import GateError, Interrupted, MergeCliError, UsageError
from merge_cli.evaluation.live import fetch_everything
from merge_cli.options import MergeOptions, OnProgress, Progress
from merge_cli.planning.plan import Plan
from merge_cli.planning.planner import make_plan
from merge_cli.recipe.statistics import FOLDER


@dataclass(frozen=True)
class AutomaticResult:
    """The best merge.

    Attributes:
        plan: of it; static, or with its statistics or coefficients.
        record: the path and the verdict, for the report (docs/auto.md).
        folders: that belong into OUT, by name: models, statistics.
        discard: throws the workspace away.
    """

    plan: Plan
    record: dict[str, Any]
    folders: Mapping[str, Path]
    discard: Callable[[], None]


def find_best(
    plan: Plan,
    target: Path,
    options: MergeOptions,
    on_progress: OnProgress,
    *,
    require_improvement: bool = False,
) -> AutomaticResult:
    """Try one step after the other; continue where a run was stopped.

    Args:
        target: OUT; work happens in OUT.auto.
        require_improvement: refuse a result that is no better than every static merge.

    Raises:
        RecipeError, SourceError, MismatchError, ResourceError: see `plan_automatic`.
        Interrupted: Ctrl-C or SIGTERM; the same command continues.
        GateError: `require_improvement` is not met. What is done is kept.
    """
    if launched() > 1:
        raise UsageError("auto runs in one process", hint="Start it without torchrun.")
    decided = plan_automatic(plan, options)
    fetch_everything(plan)
    inputs = inputs_of(plan)
    folder = AutomaticWorkspace(target, decided.key, fresh=options.fresh)
    with folder:
        soup = make_plan(decided.steps[0].recipe, shard_size=plan.shard_size)
        learning = folder.path / "dam"
        with workers_for(decided, soup, learning, options, on_progress) as workers:
            run = _Run(decided, folder, workers, options, on_progress)
            try:
                record = run.record()
                best = _complete(run.prepared(record["best"]), folder.path)
            except (KeyboardInterrupt, Interrupted):  # the second is how its steps say it
                workers.stop()
                raise run.interrupted() from None
        inputs.verify_or(folder.discard)
    if require_improvement and not record["verdict"]["better"]:
        message = f"improvement is required: {record['sentence']}"
        hint = "Give more data, or run without --require-improvement."
        raise GateError(message, where=str(folder.path), hint=hint)
    return AutomaticResult(best.plan, record, best.folders, folder.discard)


def _complete(best: Answer, folder: Path) -> Answer:
    """The best merge, with all that its recipe needs to give the same bytes without data."""
    if best.plan.calibrated is None:
        return best
    kept = folder / FOLDER
    plan = with_folder(best.plan, kept)
    return replace(best, plan=plan, folders={**best.folders, FOLDER: kept})


class _Run:
    """One run, from whatever the journal holds to the record."""

    def __init__(
        self,
        decided: AutomaticPlan,
        folder: AutomaticWorkspace,
        workers: Workers,
        options: MergeOptions,
        on_progress: OnProgress,
    ) -> None:
        self._decided, self._folder, self._workers = decided, folder, workers
        self._options, self._on_progress = options, on_progress
        self._trials = Trials(decided, folder, on_progress)
        self._prepared: dict[str, Answer] = {}  # by step

    def record(self) -> dict[str, Any]:
        """The path, the best of it, and the verdict on test rows."""
        ended = self._try_all()
        path = self._trials.path()
        measured = [line for line in path if line["loss"] is not None]
        if not measured:
            raise MergeCliError("no merge predicts numbers", hint="Check the models.")
        best = choose(measured, lambda names: self._rows(names, "final", "all validation rows"))
        static = min(
            (line for line in measured if not line["method"]), key=lambda line: line["loss"]
        )
        soup = [line["step"] for line in measured if line["step"] == SOUP]
        others = [line["step"] for line in measured if line["method"]]
        verdict = judge(
            best["step"],
            [*soup, static["step"]],
            others,
            lambda names: self._rows(names, "test", "test rows"),
        )
        parts = self._decided.parts
        return {
            "best": best["step"],
            "best_static": static["step"],
            "path": path,
            "ended": ended,
            "verdict": verdict,
            "sentence": sentence(best, verdict),
            "datasets": [{"name": part.name, "rows": dict(part.counts)} for part in parts],
            "cost": {
                "seconds": max(line["clock"] for line in measured),
                "cpu_seconds": math.fsum(line["cpu_seconds"] for line in path),
                "tokens": sum(line["tokens"] for line in path),
                "final_tokens": self._decided.final_tokens
                * sum("final_loss" in line for line in path),
                "test_tokens": self._decided.test_tokens * len(verdict["loss"]),
                "processes": self._workers.count,
            },
        }

    def prepared(self, step: str) -> Answer:
        """The plan that merges what a step has tried, and what belongs to it."""
        if step not in self._prepared:  # everything about it was in the journal
            job = self._trials.job_of(step, "")
            answers = self._workers.run(iter([job])) if job.method else [(job, Answer(job.plan))]
            self._prepared |= {job.step: answer for job, answer in answers}
        return self._prepared[step]

    def interrupted(self) -> Interrupted:
        """With the best so far."""
        path = self._trials.path()
        message = f"stopped after {len(path)} of {len(self._decided.steps)} steps"
        if measured := [line for line in path if line["loss"] is not None]:
            best = min(measured, key=lambda line: line["loss"])
            message += f"; the best so far is {best['step']}, validation loss {best['loss']:.4f}"
        hint = "The same command continues; with --accept-best it publishes the best so far."
        return Interrupted(message, where=str(self._folder.path), hint=hint)

    def _try_all(self) -> str:
        """Every step that the budget allows, or until the user accepts the best; why it ended."""
        trials, accepts = self._trials, self._options.accept_best
        # What an earlier run has found is accepted as it stands.
        if accepts and trials.has_best:
            trials.accept()
        try:
            for job, answer in self._workers.run(trials.jobs()):
                self._take(job, answer)
        except (KeyboardInterrupt, Interrupted):
            if not (accepts and trials.has_best):
                raise
            self._workers.stop()
            trials.accept()
        return trials.ended

    def _take(self, job: Job, answer: Answer) -> None:
        """Note what a worker has measured."""
        loss = mean_loss(answer.losses) if answer.losses else math.nan
        if job.weights:
            self._trials.take_candidate(job, answer, loss)
            return
        self._prepared[job.step] = answer
        self._trials.take(job, answer, loss)

    def _rows(self, steps: Sequence[str], part: str, words: str) -> dict[str, Losses]:
        """The losses of steps on final or test rows; from the journal where it has them."""
        lines = {step: self._folder.line(part, step) for step in steps}
        missing = [step for step in steps if lines[step] is None]

        def jobs() -> Iterator[Job]:
            for step in missing:
                self._on_progress(Progress("auto", 0, 0, f"{words}: {step}"))
                plan = self._prepared[step].plan if step in self._prepared else None
                yield self._trials.job_of(step, part, plan)

        for job, answer in self._workers.run(jobs()):
            if answer.error:
                raise MergeCliError(answer.error, where=job.step)
            self._prepared.setdefault(job.step, answer)
            line = {"kind": part, "step": job.step, "rows": to_json(answer.losses)}
            self._folder.append(line)
            lines[job.step] = line
        return {step: from_json(line["rows"]) for step, line in lines.items() if line is not None}
