"""What a comparison found: scores with intervals, normalised, averaged, and who is not beaten.

Everything is computed from examples that every model answered, with the same resampled draws for
all (`evaluation.intervals`), so that averages and differences have paired intervals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from merge_cli.comparison.cost import MergeCost
from merge_cli.evaluation.quality_check import Gate, check_gates
from merge_cli.evaluation.result import Better, Evaluation
from merge_cli.evaluation.summary import Interval, interval, resampled

Role = Literal["base", "source", "baseline", "recipe"]


@dataclass(frozen=True)
class ModelEntry:
    """One model of a comparison.

    Attributes:
        place: its folder or Hub id.
        recipe: of a merge, the recipe's text; empty for base and sources.
        cost: of a merge, what it took to make it.
    """

    name: str
    role: Role
    place: str
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
        entrants: base, sources, baselines, recipes, in this order.
        experts: task -> the source that its data belongs to, where there is one.
        soup: the name of the uniform soup, which merges are measured against.
        same: a name -> the entrant that is the same merge.
        remarks: what a reader should know, one line each; `notes` has more.
    """

    entrants: tuple[ModelEntry, ...]
    experts: Mapping[str, str]
    soup: str | None = None
    same: Mapping[str, str] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> ModelEntry:
        requested = self.same.get(name, name)
        return next(entrant for entrant in self.entrants if entrant.name == requested)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, in the order of the evaluation."""
        return tuple(self.entrants[0].evaluation.tasks)

    @property
    def base(self) -> ModelEntry | None:
        return next((entrant for entrant in self.entrants if entrant.role == "base"), None)

    @property
    def reference(self) -> ModelEntry | None:
        """What merges are measured against: the uniform soup."""
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
        return self.entrants[0].evaluation[task].primary.unit

    def better(self, task: str) -> Better:
        return self.entrants[0].evaluation[task].primary.better

    @cached_property
    def scores(self) -> dict[tuple[str, str], ModelScore]:
        """(entrant, task) -> the task's primary metric."""
        result = {}
        for entrant in self.entrants:
            for name, task in entrant.evaluation.tasks.items():
                metric = task.primary
                draws = resampled(metric, name)
                single = len(metric.parts) < 2
                result[entrant.name, name] = ModelScore(
                    metric.value, None if single else interval(draws), draws
                )
        return result

    @cached_property
    def normalised(self) -> dict[tuple[str, str], ModelScore]:
        """(entrant, task) -> 0 at the base, 1 at the task's own expert.

        Only of tasks whose expert is better than the base, and by more than chance (the interval
        of the difference excludes 0): elsewhere there is nothing to share out.
        """
        base = self.base
        result: dict[tuple[str, str], ModelScore] = {}
        if base is None:
            return result
        for task, expert in self.experts.items():
            zero, one = self.scores[base.name, task], self.scores[expert, task]
            sign = 1.0 if self.better(task) == "higher" else -1.0
            gap = sign * (one.draws - zero.draws)
            if sign * (one.value - zero.value) <= 0 or interval(gap).low <= 0:
                continue
            # One draw in forty may have lost the expert's lead: there the value's own gap counts.
            widths = sign * _where(gap > 0, gap, abs(one.value - zero.value))
            for entrant in self.entrants:
                score = self.scores[entrant.name, task]
                value = (score.value - zero.value) / (one.value - zero.value) + 0.0  # no -0
                draws = (score.draws - zero.draws) / widths
                # Base and expert are 0 and 1 by definition: no interval.
                fixed = score.interval is None or entrant.name in (base.name, expert)
                result[entrant.name, task] = ModelScore(
                    value, None if fixed else interval(draws), draws
                )
        return result

    @cached_property
    def shared(self) -> tuple[str, ...]:
        """The tasks that a normalised mean is over."""
        return tuple(
            task for task in self.tasks if (self.entrants[0].name, task) in self.normalised
        )

    @cached_property
    def averages(self) -> dict[str, ModelScore]:
        """Entrant -> mean over the tasks, where all have one unit; else empty."""
        if len({self.unit(task) for task in self.tasks}) > 1:
            return {}
        return {e.name: _mean([self.scores[e.name, t] for t in self.tasks]) for e in self.entrants}

    @cached_property
    def quality(self) -> dict[str, ModelScore]:
        """Entrant -> mean of what is normalised: 0 the base, 1 every expert at its own."""
        if not self.shared:
            return {}
        return {
            e.name: _mean([self.normalised[e.name, t] for t in self.shared]) for e in self.entrants
        }

    @cached_property
    def ranking(self) -> dict[str, ModelScore]:
        """What orders the models: the normalised mean, or else the mean, or the only task."""
        return (
            self.quality
            or self.averages
            or {e.name: self.scores[e.name, self.tasks[0]] for e in self.entrants}
        )

    @property
    def ranking_better(self) -> Better:
        return "higher" if self.quality else self.better(self.tasks[0])

    def gain(self, name: str) -> ModelScore | None:
        """How much better than the uniform soup a model is; positive is better."""
        reference = self.reference
        if reference is None or reference.name == name:
            return None
        sign = 1.0 if self.ranking_better == "higher" else -1.0
        ours, theirs = self.ranking[name], self.ranking[reference.name]
        draws = sign * (ours.draws - theirs.draws)
        # One example: nothing is known of chance.
        certain = ours.interval is None and theirs.interval is None
        value = sign * (ours.value - theirs.value)
        return ModelScore(value, None if certain else interval(draws), draws)

    @cached_property
    def front(self) -> tuple[str, ...]:
        """The merges that no other one beats in both quality and seconds, the cheapest first."""
        sign = 1.0 if self.ranking_better == "higher" else -1.0
        merges = [
            (e.cost.seconds, -sign * self.ranking[e.name].value, e.name)
            for e in self.entrants
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
        """For every recipe's merge, why each gate that it does not meet is not met."""
        known = {entrant.name: entrant.evaluation for entrant in self.entrants}
        known |= {name: known[kept] for name, kept in self.same.items()}
        if self.base is not None:
            known.setdefault("base", self.base.evaluation)
        return {
            item.name: check_gates(gates, item.evaluation, known)
            for item in self.entrants
            if item.role == "recipe"
        }


def _where(condition: Any, then: Any, otherwise: float) -> Any:
    """numpy.where, imported where it is used."""
    import numpy as np

    return np.where(condition, then, otherwise)


def _mean(scores: Sequence[ModelScore]) -> ModelScore:
    draws = sum(score.draws for score in scores) / len(scores)
    value = sum(score.value for score in scores) / len(scores)
    certain = all(score.interval is None for score in scores)
    return ModelScore(value, None if certain else interval(draws), draws)
