"""From a recipe that leaves the method open to one that names it, step by step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_cli.auto.checks import SEARCH, SOUP
from merge_cli.auto.measure import Losses, from_json, gain, mean_loss, measure, to_json
from merge_cli.auto.plan import AutomaticPlan, Step, plan_automatic
from merge_cli.auto.weights import Weights, best_weights, candidate_count, weighted
from merge_cli.calibration.run import calibrate
from merge_cli.dam.distributed import launched
from merge_cli.dam.plan import fetch_everything
from merge_cli.dam.run import Learned, learn, with_coefficients
from merge_cli.engine.inputs import inputs_of
from merge_cli.errors import GateError, Interrupted, MergeCliError, NonFiniteError, UsageError
from merge_cli.evolve.mergeable import MergeableModel
from merge_cli.options import MergeOptions, OnProgress, Progress
from merge_cli.planning.plan import Plan
from merge_cli.planning.planner import make_plan
from merge_cli.system.machine import torch_threads
from merge_cli.system.workspace import JournalWorkspace

if TYPE_CHECKING:
    from merge_cli.recipe.schema import Recipe

_BATCH_TOKENS = 4096
_STANDARD_ERRORS = 1.96  # of a 95 % interval, on either side
_FINALISTS = 3  # steps that more validation rows choose from


class AutomaticWorkspace(JournalWorkspace):
    """OUT.auto: a journal with a line for each step that is done, and what dam has learned."""

    def __init__(self, target: Path, key: str, *, fresh: bool) -> None:
        super().__init__(target, ".auto", "automatic merge", key, fresh=fresh)

    def line(self, kind: str, step: str) -> dict[str, Any] | None:
        """The line of a step that is done."""
        lines = (line for line in self.lines if (line["kind"], line["step"]) == (kind, step))
        return next(lines, None)


@dataclass(frozen=True)
class AutomaticResult:
    """The best merge.

    Attributes:
        plan: of it; static, or with its statistics or coefficients.
        record: the path and the verdict, for the report (docs/auto.md).
        discard: throws the workspace away.
    """

    plan: Plan
    record: dict[str, Any]
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
                resolved = run.plan_of(record["best"])
        except (KeyboardInterrupt, Interrupted):  # the second is how its steps say it
            raise run.interrupted() from None
        finally:
            run.close()
        inputs.verify_or(folder.discard)
    if require_improvement and not record["verdict"]["better"]:
        message = f"improvement is required: {record['sentence']}"
        hint = "Give more data, or run without --require-improvement."
        raise GateError(message, where=str(folder.path), hint=hint)
    return AutomaticResult(resolved, record, folder.discard)


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
        self._model: MergeableModel | None = None
        self._plans: dict[str, Plan] = {}
        self._learned: Learned | None = None
        self._path: list[dict[str, Any]] = []

    def record(self) -> dict[str, Any]:
        """The path, the best of it, and the verdict on test rows."""
        ended = self._try_all()
        measured = self._measured_lines()
        if not measured:
            raise MergeCliError("no merge predicts numbers", hint="Check the models.")
        best = self._chosen(measured)
        static = min(
            (line for line in measured if not line["method"]), key=lambda line: line["loss"]
        )
        soup = [line["step"] for line in measured if line["step"] == SOUP]
        others = [line["step"] for line in measured if line["method"]]
        verdict = self._verdict(best["step"], [*soup, static["step"]], others)
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

    def plan_of(self, name: str) -> Plan:
        """The plan that merges what a step has tried."""
        if name not in self._plans:
            step = next(step for step in self._decided.steps if step.name == name)
            self._plans[name] = self._plan(step)
        return self._plans[name]

    def interrupted(self) -> Interrupted:
        """With the best so far."""
        measured = self._measured_lines()
        message = f"stopped after {len(self._path)} of {len(self._decided.steps)} steps"
        if measured:
            best = min(measured, key=lambda line: line["loss"])
            message += f"; the best so far is {best['step']}, validation loss {best['loss']:.4f}"
        hint = "The same command continues; with --accept-best it publishes the best so far."
        return Interrupted(message, where=str(self._folder.path), hint=hint)

    def close(self) -> None:
        """Let go of the model in memory."""
        if self._model is not None:
            self._model.close()
            self._model = None

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
                self.close()  # it may be half another merge
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

    def _chosen(self, measured: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The best few on all validation rows; of those that are as good as the best, the first.

        As good: within one standard error of the paired difference (the rule of Breiman et al.,
        Classification and Regression Trees, 1984). The first needs the least.
        """
        few = sorted(measured, key=lambda line: line["loss"])[:_FINALISTS]
        if len(few) == 1:
            return few[0]
        losses = {
            line["step"]: self._rows_of(line["step"], "final", "all validation rows")
            for line in few
        }
        for line in few:
            line["final_loss"] = mean_loss(losses[line["step"]])
        best = min(few, key=lambda line: line["final_loss"])

        def as_good(line: Mapping[str, Any]) -> bool:
            value, low, high = gain(losses[best["step"]], losses[line["step"]])
            return value <= (high - low) / (2 * _STANDARD_ERRORS)

        return next(line for line in measured if line in few and (line is best or as_good(line)))

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
        if step.method and step.method != SEARCH:
            self.close()  # one model at a time in memory
        elif self._model is None:
            self._load()
        began, cpu_began = time.monotonic(), time.process_time()
        losses: Losses = {}
        loss, error = math.nan, "it predicts NaN or Inf"
        try:
            losses = self._measured(step.name, "validation")
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

    def _measured(self, name: str, part: str) -> Losses:
        return self._losses(self.plan_of(name), part)

    def _losses(self, plan: Plan, part: str) -> Losses:
        if self._model is None:
            self._load()
        assert self._model is not None
        self._model.become(plan.recipe, plan)
        live = self._model.live
        return {
            data.name: measure(live, getattr(data, part), data.name) for data in self._decided.parts
        }

    def _load(self) -> None:
        soup = self._decided.steps[0].recipe
        self._model = MergeableModel(
            soup,
            self._options,
            device=self._options.device,
            batch_tokens=_BATCH_TOKENS,
            seed=soup.seed,
        )

    def _plan(self, step: Step) -> Plan:
        size = self._decided.plan.shard_size
        plan = make_plan(step.recipe, shard_size=size)
        if step.method == SEARCH:
            return make_plan(weighted(step.recipe, self._searched(step.recipe)), shard_size=size)
        if step.method in ("fisher", "regmean"):
            return calibrate(plan, self._options, self._on_progress)
        if step.method == "dam":
            if self._learned is None:
                self._learned = learn(
                    plan,
                    self._folder.path / "dam",
                    self._options,
                    on_progress=self._of_learning,
                )
            learned = self._learned
            recipe = with_coefficients(plan.recipe, learned.coefficients, learned.record)
            return make_plan(recipe, shard_size=size)
        return plan

    def _searched(self, recipe: Recipe) -> Weights:
        """The best weights that a search finds, from the best step that has weights."""
        steps = {step.name: step.weights for step in self._decided.steps if step.weights}
        known = [line for line in self._measured_lines() if line["step"] in steps]
        start = min(known, key=lambda line: line["loss"], default={"step": SOUP})["step"]
        done = [line for line in self._folder.lines if line["kind"] == "candidate"]
        total = candidate_count(len(recipe.models))

        def loss(number: int, weights: Weights) -> float:
            if number < len(done):
                value = done[number]["loss"]
            else:
                value = self._candidate_loss(weighted(recipe, weights))
                line = {"kind": "candidate", "step": SEARCH, "weights": list(weights)}
                self._folder.append({**line, "loss": value})
            self._on_progress(Progress("search", number + 1, total, "", "candidates"))
            return math.nan if value is None else float(value)

        return best_weights(steps[start], recipe.seed, loss)

    def _candidate_loss(self, recipe: Recipe) -> float | None:
        """The mean loss on the search's rows; None where the merge predicts no numbers."""
        try:
            value = mean_loss(self._losses(make_plan(recipe), "search"))
        except NonFiniteError:
            return None
        return value if math.isfinite(value) else None

    def _of_learning(self, progress: Progress) -> None:
        """How far learning is; what it says of its own worth is not the verdict here."""
        if progress.total:
            self._on_progress(progress)

    def _rows_of(self, name: str, part: str, words: str) -> Losses:
        """The losses of a step on final or test rows; from the journal where it has them."""
        line = self._folder.line(part, name)
        if line is None:
            self._on_progress(Progress("auto", 0, 0, f"{words}: {name}"))
            line = {"kind": part, "step": name, "rows": to_json(self._measured(name, part))}
            self._folder.append(line)
        return from_json(line["rows"])

    def _verdict(self, best: str, rivals: Sequence[str], others: Sequence[str]) -> dict[str, Any]:
        """Test rows are looked at here, and nowhere else. They decide nothing.

        Args:
            rivals: what it is compared with; the best static merge is the last of them.
            others: what the path shows, too.
        """
        losses = {
            name: self._rows_of(name, "test", "test rows")
            for name in dict.fromkeys((best, *rivals, *others))
        }

        def gains(than: Callable[[str], tuple[Losses, Losses]], names: Sequence[str]) -> Any:
            words = ("value", "low", "high")
            return {name: dict(zip(words, gain(*than(name)), strict=True)) for name in names}

        than_rival = gains(
            lambda name: (losses[best], losses[name]),
            [name for name in dict.fromkeys(rivals) if name != best],
        )
        than_soup = gains(
            lambda name: (losses[name], losses[SOUP]),
            [name for name in losses if name != SOUP and SOUP in losses],
        )
        return {
            "loss": {name: mean_loss(rows) for name, rows in losses.items()},
            "losses": {name: {n: m.value for n, m in r.items()} for name, r in losses.items()},
            "gain": than_rival,
            "gain_over_soup": than_soup,
            "better": best != rivals[-1] and than_rival[rivals[-1]]["low"] > 0,
        }


def _left_out(step: Step, why: str) -> dict[str, Any]:
    nothing: dict[str, Any] = {"loss": None, "losses": {}, "tokens": 0}
    nothing |= {"seconds": 0.0, "cpu_seconds": 0.0}
    about = {"kind": "step", "step": step.name, "method": step.method, "kept": False}
    return {**about, **nothing, "note": why}


def _shown(line: Mapping[str, Any]) -> str:
    return f"{line['step']}: " + (line["note"] or f"validation loss {line['loss']:.4f}")


def sentence(best: Mapping[str, Any], verdict: Mapping[str, Any]) -> str:
    """The verdict in plain words."""
    name, gains = best["step"], verdict["gain"]
    loss = verdict["loss"][name]
    if not gains:
        return f"Nothing beats the {name} on validation rows: test loss {loss:.4f} nats per token."

    def words(other: str) -> str:
        value, low, high = (gains[other][key] for key in ("value", "low", "high"))
        way = "below" if value >= 0 else "above"
        sure = "" if low > 0 or high < 0 else ", which may be chance"
        bounds = sorted((abs(low), abs(high))) if low > 0 or high < 0 else (low, high)
        of_test = f"95 % interval {bounds[0]:.4f} to {bounds[1]:.4f}{sure}"
        return f"{abs(value):.4f} {way} {other} ({of_test})"

    text = f"Validation rows choose {name}: test loss {loss:.4f} nats per token, "
    return text + " and ".join(words(other) for other in gains) + "."
