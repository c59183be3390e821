"""Which step is tried next: their order, the budget, the search's candidates, and what is done.

Steps begin in their order. With one worker each one ends before the next begins. With several,
what does not depend on another step is tried at the same time: only the search and learning wait,
for the merges that they may start from.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from merge_cli.auto.checks import SEARCH
from merge_cli.auto.plan import AutomaticPlan, Step
from merge_cli.auto.search import CandidateSearch, start_of
from merge_cli.auto.weights import weighted
from merge_cli.auto.worker import Answer, Job
from merge_cli.auto.workspace import AutomaticWorkspace
from merge_cli.options import OnProgress, Progress
from merge_cli.planning.plan import Plan
from merge_cli.planning.planner import make_plan
from merge_cli.recipe.schema import Recipe

Line = dict[str, Any]
_STOPPED = "stopped: the best so far was accepted"
_NOT_TRIED = "not tried: the best so far was accepted"
_VALIDATION = "validation"
_START = "start"  # a line of the journal: where learning begins


class Trials:
    """The steps, from what the journal holds on."""

    def __init__(
        self,
        decided: AutomaticPlan,
        folder: AutomaticWorkspace,
        on_progress: OnProgress,
    ) -> None:
        self._decided, self._folder, self._on_progress = decided, folder, on_progress
        self._steps = {step.name: step for step in decided.steps}
        journal = {name: folder.line("step", name) for name in self._steps}
        self._lines: dict[str, Line] = {name: line for name, line in journal.items() if line}
        self._left_out: dict[str, str] = {}  # step -> why
        self._busy: set[str] = set()
        self._search: CandidateSearch | None = None
        self._is_measured = False  # or being measured: what the search has found
        self._accepted = False
        self._began = time.monotonic() - max(
            (line["clock"] for line in folder.lines if "clock" in line), default=0.0
        )

    @property
    def has_best(self) -> bool:
        """Whether a merge has been measured that predicts numbers."""
        return any(line["loss"] is not None for line in self._lines.values())

    @property
    def ended(self) -> str:
        """Why nothing more is tried."""
        if self._accepted:
            return "it was stopped, and the best so far accepted"
        if self._left_out:
            return f"the budget is spent; left out: {', '.join(self._left_out)}"
        return "every step is done"

    def accept(self) -> None:
        """Try nothing more."""
        self._accepted = True
        for name in self._steps:
            if name not in self._lines and name not in self._left_out:
                begun = name in self._busy
                self._left_out[name] = _STOPPED if begun else _NOT_TRIED
        self._busy.clear()

    def path(self) -> list[Line]:
        """A line for each step that is done or left out, in order; kept: better than all before."""
        lowest, result = math.inf, []
        for name, step in self._steps.items():
            line = self._lines.get(name)
            if line is not None:
                kept = line["loss"] is not None and line["loss"] < lowest
                lowest = line["loss"] if kept else lowest
                result.append({**line, "kept": kept})
            elif name in self._left_out:
                result.append(_nothing(step, self._left_out[name]))
        return result

    def jobs(self) -> Iterator[Job | None]:
        """What to do next, asked when a worker is free; None where another job must end first."""
        while True:
            job = self._next()
            if job is None and not self._busy:
                return
            yield job

    def job_of(self, name: str, part: str, plan: Plan | None = None) -> Job:
        """Measure a step's merge on a part of the rows; with its plan, if that is complete."""
        step = self._steps[name]
        if plan is not None:
            return Job(name, plan, "", part)
        recipe = step.recipe
        if step.begins_at_best:
            recipe = self._begun_at_best(recipe)
        if step.method == SEARCH:
            recipe = weighted(recipe, self._weights())
        return Job(name, self._plan(recipe), step.method if step.prepares else "", part)

    def take(self, job: Job, answer: Answer, loss: float) -> None:
        """A step is done."""
        step, finite = self._steps[job.step], math.isfinite(loss)
        search = self._search if step.method == SEARCH else None
        line = {
            "kind": "step",
            "step": step.name,
            "method": step.method,
            "loss": loss if finite else None,
            "losses": {n: m.value for n, m in answer.losses.items()} if finite else {},
            "seconds": round(answer.seconds + (search.cost("seconds") if search else 0.0), 3),
            "cpu_seconds": round(
                answer.cpu_seconds + (search.cost("cpu_seconds") if search else 0.0), 3
            ),
            "clock": round(time.monotonic() - self._began, 3),
            "tokens": step.tokens + self._decided.validation_tokens,
            "note": "" if finite else answer.error or "it predicts NaN or Inf",
        }
        self._folder.append(line)
        self._lines[step.name] = line
        self._busy.discard(step.name)
        self._say(_shown(line))

    def take_candidate(self, job: Job, answer: Answer, loss: float) -> None:
        """A candidate of the search is measured."""
        assert self._search is not None, "it has given the candidate"
        cost = {"seconds": round(answer.seconds, 3), "cpu_seconds": round(answer.cpu_seconds, 3)}
        self._search.take(job.weights, loss, cost)

    def _next(self) -> Job | None:
        """The next job that can begin now."""
        if self._search is not None and SEARCH in self._busy and (job := self._of_search()):
            return job
        for step in self._decided.steps:
            name = step.name
            if name in self._lines or name in self._left_out or name in self._busy:
                continue
            if not self._can_begin(step):
                continue
            if step is not self._decided.steps[0] and (why := self._too_much(step)):
                self._left_out[name] = why
                continue
            self._busy.add(name)
            self._say(name)
            if step.method != SEARCH:
                return self.job_of(name, _VALIDATION)
            self._search = self._begun_search()
            return self._of_search()
        return None

    def _can_begin(self, step: Step) -> bool:
        """Whether what a step, or what the budget says of it, depends on is there."""
        first = self._decided.steps[0]
        is_timed = self._decided.budget.minutes is not None
        if is_timed and step is not first and first.name not in self._lines:
            return False  # it shows how fast measuring is
        busy = [self._steps[name] for name in self._busy]
        if step.method == SEARCH:
            return not any(other.weights for other in busy)
        return not step.begins_at_best or all(other.method == SEARCH for other in busy)

    def _begun_at_best(self, recipe: Recipe) -> Recipe:
        """Learning that starts at the best of the merges before it that it can start at.

        It stays the one that it began with: a larger budget may bring better ones afterwards.
        """
        begun = self._folder.line(_START, "dam")
        best = self._best_start() if begun is None else begun["start"]
        if best is None:
            return recipe
        if begun is None:
            self._folder.append({"kind": _START, "step": "dam", "start": best})
        return replace(recipe, training=replace(recipe.learning, start=best))

    def _best_start(self) -> Any:
        measured = [
            (line["loss"], start)
            for name, line in self._lines.items()
            if (start := self._steps[name].start) is not None and line["loss"] is not None
        ]
        return min(measured, key=lambda pair: pair[0])[1] if measured else None

    def _of_search(self) -> Job | None:
        """The next candidate; at the end the best of them, once."""
        search, step = self._search, self._steps[SEARCH]
        assert search is not None
        if (weights := search.next()) is not None:
            plan = self._plan(weighted(step.recipe, weights))
            return Job(SEARCH, plan, "", "search", weights)
        if search.ended and not self._is_measured:
            self._is_measured = True
            return self.job_of(SEARCH, _VALIDATION)
        return None

    def _begun_search(self) -> CandidateSearch:
        starts = {step.name: step.weights for step in self._decided.steps if step.weights}
        lines = [self._lines[name] for name in self._steps if name in self._lines]
        seed = self._steps[SEARCH].recipe.seed
        start = starts[start_of(lines, starts)]
        return CandidateSearch(start, seed, self._folder, self._on_progress)

    def _weights(self) -> tuple[float, ...]:
        """What the search has found; from the journal, if it ended in an earlier run."""
        self._search = self._search or self._begun_search()
        assert self._search.ended, "its step is done"
        return self._search.best

    def _plan(self, recipe: Recipe) -> Plan:
        return make_plan(recipe, shard_size=self._decided.plan.shard_size)

    def _too_much(self, step: Step) -> str:
        """Why the budget does not allow a step; empty where it does."""
        budget, validation = self._decided.budget, self._decided.validation_tokens
        before = self._decided.steps[: self._decided.steps.index(step)]
        spent = sum(s.tokens + validation for s in before if s.name not in self._left_out)
        needed = step.tokens + validation
        if budget.tokens is not None and spent + needed > budget.tokens:
            left = max(0, int(budget.tokens) - spent)
            return f"it takes about {needed:,} tokens, and {left:,} are left"
        if budget.minutes is None:
            return ""
        left_seconds = 60 * budget.minutes - (time.monotonic() - self._began)
        soup = self._lines[self._decided.steps[0].name]
        a_token = soup["seconds"] / max(1, soup["tokens"])
        seconds = (step.tokens * step.work + validation) * a_token
        if seconds > left_seconds:
            return f"it takes about {seconds:.0f} s, and {max(0.0, left_seconds):.0f} s are left"
        return ""

    def _say(self, note: str) -> None:
        """How many steps are done or left out, of all."""
        done = len(self._lines) + len(self._left_out)
        self._on_progress(Progress("auto", done, len(self._steps), note, "steps"))


def _nothing(step: Step, why: str) -> Line:
    nothing: Line = {"loss": None, "losses": {}, "tokens": 0}
    nothing |= {"seconds": 0.0, "cpu_seconds": 0.0}
    about = {"kind": "step", "step": step.name, "method": step.method, "kept": False}
    return {**about, **nothing, "note": why}


def _shown(line: Mapping[str, Any]) -> str:
    return f"{line['step']}: " + (line["note"] or f"validation loss {line['loss']:.4f}")
