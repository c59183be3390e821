"""The result of a comparison: scores with intervals, normalised, averaged, and the Pareto front.

Everything is computed from examples that every model answered, with the same resampled draws for
all (`evaluation.summary`), so that averages and differences have paired intervals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from merge_cli.comparison.cost import MergeCost
from merge_cli.evaluation.gates import Gate, check_gates
from merge_cli.evaluation.result import Better, Evaluation
from merge_cli.evaluation.summary import Interval, interval, resampled

Role = Literal["base", "source", "baseline", "recipe"]


@dataclass(frozen=True)
class ModelEntry:
    """One model of a comparison.

    Attributes:
        location: its folder or Hub id.
        recipe: a merge's recipe as text; empty for base and sources.
        cost: of making a merge.
    """

    name: str
    role: Role
    location: str
    evaluation: Evaluation = field(repr=False)
    method: str = ""
    recipe: str = field(default="", repr=False)
    cost: MergeCost | None = None

    @property
    def merged(self) -> bool:
        return self.role in ("baseline", "recipe")


@dataclass(frozen=True)
class ModelScore:
    """A value with its 95 % interval; None where there is a single example."""

    value: float
    interval: Interval | None
    draws: Any = field(repr=False, compare=False)  # float64 [draws]


@dataclass(frozen=True)
class Comparison:
    """Models on the same tasks.

    Attributes:
        entries: base, sources, baselines, recipes, in this order.
        experts: task -> the source that its data belongs to, where there is one.
        soup: the name of the uniform soup, which merges are measured against.
        same: a name -> the entrant that is the same merge.
        remarks: what a reader should know, one line each; `notes` has more.
    """

    entries: tuple[ModelEntry, ...]
    experts: Mapping[str, str]
    soup: str | None = None
    same: Mapping[str, str] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> ModelEntry:
        entry_name = self.same.get(name, name)
        return next(entry for entry in self.entries if entry.name == entry_name)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, in the order of the evaluation."""
        return tuple(self.entries[0].evaluation.tasks)

    @property
    def base(self) -> ModelEntry | None:
        return next((entry for entry in self.entries if entry.role == "base"), None)

    @property
    def reference(self) -> ModelEntry | None:
        """The entry that merges are compared with: the uniform soup."""
        return self[self.soup] if self.soup is not None else None

    @property
    def notes(self) -> tuple[str, ...]:
        """The remarks, and why a domain with an expert is not normalised."""
        left_out = [
            f"{task} is not normalised: its expert {expert} is no better there than the base"
            for task, expert in self.experts.items()
            if self.base is not None and task not in self.shared
        ]
        return (*self.remarks, *left_out)

    def unit(self, task: str) -> str:
        return self.entries[0].evaluation[task].primary.unit

    def better(self, task: str) -> Better:
        return self.entries[0].evaluation[task].primary.better

    @cached_property
    def scores(self) -> dict[tuple[str, str], ModelScore]:
        """(entrant, task) -> the task's primary metric."""
        scores = {}
        for entry in self.entries:
            for name, task in entry.evaluation.tasks.items():
                metric = task.primary
                draws = resampled(metric, name)
                single = len(metric.parts) < 2
                scores[entry.name, name] = ModelScore(
                    metric.value, None if single else interval(draws), draws
                )
        return scores

    @cached_property
    def normalised(self) -> dict[tuple[str, str], ModelScore]:
        """(entrant, task) -> 0 at the base, 1 at the task's own expert.

        Only of tasks whose expert is better than the base, and by more than chance (the interval
        of the difference excludes 0).
        """
        import numpy as np

        base = self.base
        normalised: dict[tuple[str, str], ModelScore] = {}
        if base is None:
            return normalised
        for task, expert in self.experts.items():
            at_base, at_expert = self.scores[base.name, task], self.scores[expert, task]
            sign = 1.0 if self.better(task) == "higher" else -1.0
            gap = sign * (at_expert.draws - at_base.draws)
            if sign * (at_expert.value - at_base.value) <= 0 or interval(gap).low <= 0:
                continue
            # In one draw of forty the expert may not be better: the gap of the values counts then.
            widths = sign * np.where(gap > 0, gap, abs(at_expert.value - at_base.value))
            for entry in self.entries:
                score = self.scores[entry.name, task]
                value = (score.value - at_base.value) / (
                    at_expert.value - at_base.value
                ) + 0.0  # no -0
                draws = (score.draws - at_base.draws) / widths
                # Base and expert are 0 and 1 by definition: no interval.
                is_fixed = score.interval is None or entry.name in (base.name, expert)
                normalised[entry.name, task] = ModelScore(
                    value, None if is_fixed else interval(draws), draws
                )
        return normalised

    @cached_property
    def shared(self) -> tuple[str, ...]:
        """The tasks that a normalised mean is over."""
        return tuple(task for task in self.tasks if (self.entries[0].name, task) in self.normalised)

    @cached_property
    def averages(self) -> dict[str, ModelScore]:
        """Entry -> mean over the tasks, where all have one unit; else empty."""
        if len({self.unit(task) for task in self.tasks}) > 1:
            return {}
        return {e.name: _mean([self.scores[e.name, t] for t in self.tasks]) for e in self.entries}

    @cached_property
    def quality(self) -> dict[str, ModelScore]:
        """Entry -> mean of normalised scores: 0 is the base, 1 every expert on its own task."""
        if not self.shared:
            return {}
        return {
            e.name: _mean([self.normalised[e.name, t] for t in self.shared]) for e in self.entries
        }

    @cached_property
    def ranking(self) -> dict[str, ModelScore]:
        """The scores that rank the models: the normalised mean, the mean, or the only task."""
        return (
            self.quality
            or self.averages
            or {e.name: self.scores[e.name, self.tasks[0]] for e in self.entries}
        )

    @property
    def ranking_better(self) -> Better:
        return "higher" if self.quality else self.better(self.tasks[0])

    def gain(self, name: str) -> ModelScore | None:
        """How much better than the uniform soup a model is; positive is better."""
        reference = self.reference
        if reference is None or reference.name == name:
            return None
        return self.difference(name, reference.name)

    def difference(self, name: str, than: str, task: str | None = None) -> ModelScore:
        """How much better one model is than another; positive is better, the interval is paired.

        Args:
            task: None compares the scores that rank the models.
        """
        if task is None:
            ours, theirs, better = self.ranking[name], self.ranking[than], self.ranking_better
        else:
            ours, theirs, better = (
                *(self.scores[n, task] for n in (name, than)),
                self.better(task),
            )
        sign = 1.0 if better == "higher" else -1.0
        draws = sign * (ours.draws - theirs.draws)
        is_single = ours.interval is None and theirs.interval is None
        value = sign * (ours.value - theirs.value)
        return ModelScore(value, None if is_single else interval(draws), draws)

    @cached_property
    def front(self) -> tuple[str, ...]:
        """Merges that no other beats in both quality and seconds, the cheapest first."""
        sign = 1.0 if self.ranking_better == "higher" else -1.0
        merges = [
            (e.cost.seconds, -sign * self.ranking[e.name].value, e.name)
            for e in self.entries
            if e.cost is not None
        ]
        front: list[str] = []
        best = float("inf")
        for _, loss, name in sorted(merges):
            if loss < best:
                front.append(name)
                best = loss
        return tuple(front)

    def unmet(self, gates: Sequence[Gate]) -> dict[str, list[str]]:
        """For each recipe's merge, a reason for each gate that it does not meet."""
        evaluations = {entry.name: entry.evaluation for entry in self.entries}
        evaluations |= {name: evaluations[original] for name, original in self.same.items()}
        if self.base is not None:
            evaluations.setdefault("base", self.base.evaluation)
        return {
            item.name: check_gates(gates, item.evaluation, evaluations)
            for item in self.entries
            if item.role == "recipe"
        }


def _mean(scores: Sequence[ModelScore]) -> ModelScore:
    draws = sum(score.draws for score in scores) / len(scores)
    value = sum(score.value for score in scores) / len(scores)
    are_single = all(score.interval is None for score in scores)
    return ModelScore(value, None if are_single else interval(draws), draws)
