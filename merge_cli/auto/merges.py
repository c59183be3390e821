"""What each step merges, made in memory and measured: one model at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_cli.auto.checks import SEARCH, SOUP
from merge_cli.auto.measure import Losses, from_json, mean_loss, measure, to_json
from merge_cli.auto.plan import AutomaticPlan, Step
from merge_cli.auto.weights import Weights, best_weights, candidate_count, weighted
from merge_cli.auto.workspace import AutomaticWorkspace
from merge_cli.calibration.run import calibrate
from merge_cli.dam.run import Learned, learn
from merge_cli.errors import NonFiniteError
from merge_cli.evolve.mergeable import MergeableModel
from merge_cli.options import MergeOptions, OnProgress, Progress
from merge_cli.planning.plan import Plan
from merge_cli.planning.planner import make_plan

if TYPE_CHECKING:
    from merge_cli.recipe.schema import Recipe

_BATCH_TOKENS = 4096


class StepMerges:
    """The merges of the steps.

    Args:
        path: the lines of the steps so far; whoever tries them appends to it.
    """

    def __init__(
        self,
        decided: AutomaticPlan,
        folder: AutomaticWorkspace,
        path: Sequence[Mapping[str, Any]],
        options: MergeOptions,
        on_progress: OnProgress,
    ) -> None:
        self._decided, self._folder, self._options = decided, folder, options
        self._path, self._on_progress = path, on_progress
        self._model: MergeableModel | None = None
        self._plans: dict[str, Plan] = {}
        self._learned: Learned | None = None

    def plan_of(self, name: str) -> Plan:
        """The plan that merges what a step has tried."""
        if name not in self._plans:
            step = next(step for step in self._decided.steps if step.name == name)
            self._plans[name] = self._plan(step)
        return self._plans[name]

    def folders_of(self, name: str) -> Mapping[str, Path]:
        """The models that belong into OUT with what a step has tried."""
        learned = self._learned if name == "dam" else None
        return {} if learned is None else learned.folders

    def close(self) -> None:
        """Let go of the model in memory."""
        if self._model is not None:
            self._model.close()
            self._model = None

    def make_room_for(self, step: Step) -> None:
        """One model at a time in memory: the student of a training, or that of the merges."""
        if step.method and step.method != SEARCH:
            self.close()
        elif self._model is None:
            self._load()

    def measured(self, name: str, part: str) -> Losses:
        """The losses of a step's merge on one part of the rows."""
        return self._losses(self.plan_of(name), part)

    def rows_of(self, name: str, part: str, words: str) -> Losses:
        """The losses of a step on final or test rows; from the journal where it has them."""
        line = self._folder.line(part, name)
        if line is None:
            self._on_progress(Progress("auto", 0, 0, f"{words}: {name}"))
            line = {"kind": part, "step": name, "rows": to_json(self.measured(name, part))}
            self._folder.append(line)
        return from_json(line["rows"])

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
            return make_plan(self._learned.resolved(plan.recipe), shard_size=size)
        return plan

    def _searched(self, recipe: Recipe) -> Weights:
        """The best weights that a search finds, from the best step that has weights."""
        steps = {step.name: step.weights for step in self._decided.steps if step.weights}
        measured = (line for line in self._path if line["loss"] is not None)
        measured_before = [line for line in measured if line["step"] in steps]
        start = min(measured_before, key=lambda line: line["loss"], default={"step": SOUP})["step"]
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
