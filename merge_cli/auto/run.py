"""From a recipe that leaves the method open to one that names it, step by step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_cli.auto.checks import SOUP
from merge_cli.auto.measure import Losses, mean_loss
from merge_cli.auto.merges import StepMerges
from merge_cli.auto.plan import AutomaticPlan, Step, plan_automatic
from merge_cli.auto.verdict import choose, judge, sentence
from merge_cli.auto.workspace import AutomaticWorkspace
from merge_cli.dam.distributed import launched
from merge_cli.engine.inputs import inputs_of
from merge_cli.errors import GateError, Interrupted, MergeCliError, NonFiniteError, UsageError
from merge_cli.evaluation.live import fetch_everything
from merge_cli.options import MergeOptions, OnProgress, Progress
from merge_cli.planning.plan import Plan
from merge_cli.system.machine import torch_threads


@dataclass(frozen=True)
class AutomaticResult:
    """The best merge.

    Attributes:
        plan: of it; static, or with its statistics or coefficients.
        record: the path and the verdict, for the report (docs/auto.md).
        folders: models that belong into OUT, by name.
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
        run = _Run(decided, folder, options, on_progress)
        try:
            with torch_threads(options.threads):
                record = run.record()
                resolved = run.merges.plan_of(record["best"])
                folders = run.merges.folders_of(record["best"])
        except (KeyboardInterrupt, Interrupted):  # the second is how its steps say it
            raise run.interrupted() from None
        finally:
            run.merges.close()
        inputs.verify_or(folder.discard)
    if require_improvement and not record["verdict"]["better"]:
        message = f"improvement is required: {record['sentence']}"
        hint = "Give more data, or run without --require-improvement."
        raise GateError(message, where=str(folder.path), hint=hint)
    return AutomaticResult(resolved, record, folders, folder.discard)


class _Run:
    """One run, from whatever the journal holds to the record."""

    def __init__(
        self,
        decided: AutomaticPlan,
        folder: AutomaticWorkspace,
        options: MergeOptions,
        on_progress: OnProgress,
    ) -> None:
        self._decided, self._folder, self._options = decided, folder, options
        self._on_progress = on_progress
        self._path: list[dict[str, Any]] = []
        self.merges = StepMerges(decided, folder, self._path, options, on_progress)

    def record(self) -> dict[str, Any]:
        """The path, the best of it, and the verdict on test rows."""
        ended = self._try_all()
        measured, rows_of = self._measured_lines(), self.merges.rows_of
        if not measured:
            raise MergeCliError("no merge predicts numbers", hint="Check the models.")
        best = choose(measured, lambda name: rows_of(name, "final", "all validation rows"))
        static = min(
            (line for line in measured if not line["method"]), key=lambda line: line["loss"]
        )
        soup = [line["step"] for line in measured if line["step"] == SOUP]
        others = [line["step"] for line in measured if line["method"]]
        verdict = judge(
            best["step"],
            [*soup, static["step"]],
            others,
            lambda name: rows_of(name, "test", "test rows"),
        )
        parts = self._decided.parts
        return {
            "best": best["step"],
            "best_static": static["step"],
            "path": self._path,
            "ended": ended,
            "verdict": verdict,
            "sentence": sentence(best, verdict),
            "datasets": [{"name": part.name, "rows": dict(part.counts)} for part in parts],
            "cost": {
                "seconds": math.fsum(line["seconds"] for line in self._path),
                "cpu_seconds": math.fsum(line["cpu_seconds"] for line in self._path),
                "tokens": sum(line["tokens"] for line in self._path),
                "final_tokens": self._decided.final_tokens
                * sum("final_loss" in line for line in self._path),
                "test_tokens": self._decided.test_tokens * len(verdict["loss"]),
            },
        }

    def interrupted(self) -> Interrupted:
        """With the best so far."""
        measured = self._measured_lines()
        message = f"stopped after {len(self._path)} of {len(self._decided.steps)} steps"
        if measured:
            best = min(measured, key=lambda line: line["loss"])
            message += f"; the best so far is {best['step']}, validation loss {best['loss']:.4f}"
        hint = "The same command continues; with --accept-best it publishes the best so far."
        return Interrupted(message, where=str(self._folder.path), hint=hint)

    def _measured_lines(self) -> list[dict[str, Any]]:
        """The steps so far whose merges predict numbers."""
        return [line for line in self._path if line["loss"] is not None]

    def _try_all(self) -> str:
        """Every step that the budget allows, or until the user accepts the best; why it ended."""
        steps, left_out = self._decided.steps, []
        # What an earlier run has found is accepted as it stands.
        stopped = self._options.accept_best and any(
            line["kind"] == "step" and line["loss"] is not None for line in self._folder.lines
        )
        for number, step in enumerate(steps):
            line = self._folder.line("step", step.name)
            if line is None and stopped:
                self._path.append(_left_out(step, "not tried: the best so far was accepted"))
                continue
            if line is None and number and (why := self._too_much(step)):
                left_out.append(step.name)
                self._path.append(_left_out(step, f"left out: {why}"))
                continue
            try:
                self._do(step, number, line)
            except (KeyboardInterrupt, Interrupted):
                if not (self._options.accept_best and self._measured_lines()):
                    raise
                stopped = True
                self.merges.close()  # it may be half another merge
                self._path.append(_left_out(step, "stopped: the best so far was accepted"))
        if stopped:
            return "it was stopped, and the best so far accepted"
        if left_out:
            return f"the budget is spent; left out: {', '.join(left_out)}"
        return "every step is done"

    def _do(self, step: Step, number: int, line: dict[str, Any] | None) -> None:
        """One step, unless the journal has it as `line`; then its place on the path."""
        total = len(self._decided.steps)
        self._on_progress(Progress("auto", number, total, step.name, "steps"))
        if line is None:
            line = self._try(step)
            self._folder.append(line)
        # Worked out and not kept in the journal: it depends on what came before.
        lowest = min((line["loss"] for line in self._measured_lines()), default=math.inf)
        kept = line["loss"] is not None and line["loss"] < lowest
        self._path.append({**line, "kept": kept})
        self._on_progress(Progress("auto", number + 1, total, _shown(line), "steps"))

    def _too_much(self, step: Step) -> str:
        """Why the budget does not allow a step; empty where it does."""
        budget, validation = self._decided.budget, self._decided.validation_tokens
        spent = sum(line["tokens"] for line in self._path)
        needed = step.tokens + validation
        if budget.tokens is not None and spent + needed > budget.tokens:
            left = max(0, int(budget.tokens) - spent)
            return f"it takes about {needed:,} tokens, and {left:,} are left"
        if budget.minutes is None:
            return ""
        left_seconds = 60 * budget.minutes - math.fsum(line["seconds"] for line in self._path)
        soup = self._path[0]
        a_token = soup["seconds"] / max(1, soup["tokens"])
        seconds = (step.tokens * step.work + validation) * a_token
        if seconds > left_seconds:
            return f"it takes about {seconds:.0f} s, and {max(0.0, left_seconds):.0f} s are left"
        return ""

    def _try(self, step: Step) -> dict[str, Any]:
        """Make a merge in memory and measure it."""
        self.merges.make_room_for(step)
        began, cpu_began = time.monotonic(), time.process_time()
        losses: Losses = {}
        loss, error = math.nan, "it predicts NaN or Inf"
        try:
            losses = self.merges.measured(step.name, "validation")
            loss = mean_loss(losses)
        except NonFiniteError as refused:
            error = refused.message
        finite = math.isfinite(loss)
        return {
            "kind": "step",
            "step": step.name,
            "method": step.method,
            "loss": loss if finite else None,
            "losses": {n: metric.value for n, metric in losses.items()} if finite else {},
            "seconds": round(time.monotonic() - began, 3),
            "cpu_seconds": round(time.process_time() - cpu_began, 3),
            "tokens": step.tokens + self._decided.validation_tokens,
            "note": "" if finite else error,
        }


def _left_out(step: Step, why: str) -> dict[str, Any]:
    nothing: dict[str, Any] = {"loss": None, "losses": {}, "tokens": 0}
    nothing |= {"seconds": 0.0, "cpu_seconds": 0.0}
    about = {"kind": "step", "step": step.name, "method": step.method, "kept": False}
    return {**about, **nothing, "note": why}


def _shown(line: Mapping[str, Any]) -> str:
    return f"{line['step']}: " + (line["note"] or f"validation loss {line['loss']:.4f}")
