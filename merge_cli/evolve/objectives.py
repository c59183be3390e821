"""The objective of a search: tasks on three splits, with weights, directions and constraints.

An objective is a list of tasks as in an evaluation file, with further keys for weight and goal.
Scores are sums of weight * value / sum of weights, and lower is always better.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from merge_cli.errors import Problem, RecipeError
from merge_cli.evaluation.parse import (
    EvaluationForm,
    TaskEntry,
    TaskForm,
    refuse_equal_names,
    spec_of,
)
from merge_cli.evaluation.result import Better
from merge_cli.evaluation.spec import EvalSpec
from merge_cli.recipe.fields import nearest
from merge_cli.recipe.forms import Plain, Text
from merge_cli.recipe.nodes import Node
from merge_cli.recipe.reader import REFUSED, Reader
from merge_cli.recipe.schema import Recipe
from merge_cli.recipe.sections import Key, keys_of, option

SplitName = Literal["search", "validation", "test"]
# The split search with all of its rows, where candidates are scored on some of them.
ALL_ROWS: Any = "all rows"
SPLITS: tuple[SplitName, ...] = ("search", "validation", "test")


@dataclass(frozen=True)
class Goal:
    """How one task's metric counts.

    Attributes:
        metric: empty for the task's first one.
        weight: in the score; 0 for a constraint only.
        goal: min or max; empty for the metric's own direction.
        at_most, at_least: bounds that a candidate must keep.
        no_worse_than: `base`, which a candidate must not be worse than by more than `margin`.
    """

    task: str
    metric: str = option("", "which of the task's metrics; default its first", form=Text())
    weight: float = option(1.0, "weight in the score; 0 for a constraint alone", 0)
    goal: str = option(
        "", "the direction; default the metric's own", form=Plain(Literal["min", "max"])
    )
    at_most: float | None = option(None, "a bound that a candidate must keep")
    at_least: float | None = option(None, "a bound that a candidate must keep")
    no_worse_than: str = option(
        "",
        "base: a candidate must not be worse than the base by more than `margin`",
        form=Plain(Literal["base"]),
    )
    margin: float = option(0.0, "how much worse is still accepted, in the metric's unit", 0)


@dataclass(frozen=True)
class Value:
    """One metric's value, as journals keep it."""

    value: float
    better: Better


Values = Mapping[str, Mapping[str, Value]]  # task -> metric -> value; the primary metric first


@dataclass(frozen=True)
class CandidateScore:
    """A candidate's score; `total` and `parts` are better when lower.

    Attributes:
        parts: of each goal with a weight, with its weight and sign.
        violation: the sum by which constraints are violated; 0 if all are met.
    """

    total: float
    parts: tuple[float, ...]
    violation: float = 0.0

    @property
    def order(self) -> tuple[float, float]:
        """Candidates that meet the constraints first, then by score."""
        return (self.violation, self.total)


@dataclass(frozen=True)
class Split:
    """The tasks of one split, and their goals."""

    name: SplitName
    spec: EvalSpec
    goals: tuple[Goal, ...]

    @property
    def weighted(self) -> tuple[Goal, ...]:
        return tuple(goal for goal in self.goals if goal.weight)

    @property
    def needs_base(self) -> bool:
        return any(goal.no_worse_than for goal in self.goals)

    def is_maximised(self, values: Values) -> bool:
        """Whether every weighted goal is: then people read the score without its minus."""
        return all(sign_of(goal, pick(values, goal).better) < 0 for goal in self.weighted)

    def score(self, values: Values, base: Values | None = None) -> CandidateScore:
        """The score of a candidate, from its tasks' values.

        Args:
            base: the base model's values, for goals with `no_worse_than`.
        """
        parts, violation = [], 0.0
        total_weight = math.fsum(goal.weight for goal in self.weighted)
        for goal in self.goals:
            value = pick(values, goal)
            sign = sign_of(goal, value.better)
            if goal.weight:
                parts.append(sign * value.value * goal.weight / total_weight)
            if goal.at_most is not None:
                violation += max(0.0, value.value - goal.at_most)
            if goal.at_least is not None:
                violation += max(0.0, goal.at_least - value.value)
            if goal.no_worse_than and base is not None:
                limit = sign * pick(base, goal).value + goal.margin
                violation += max(0.0, sign * value.value - limit)
        return CandidateScore(math.fsum(parts), tuple(parts), violation)


@dataclass(frozen=True)
class SearchObjective:
    """All splits of the recipe; `search` is always one of them."""

    splits: Mapping[SplitName, Split]

    @property
    def search(self) -> Split:
        return self.splits["search"]

    @property
    def report(self) -> Split:
        """The last split, whose numbers are reported."""
        last = [name for name in SPLITS if name in self.splits][-1]
        return self.splits.get(ALL_ROWS, self.search) if last == "search" else self.splits[last]

    @property
    def final(self) -> Split | None:
        """What the best few are compared on; None where all of it has been seen."""
        return self.splits.get("validation") or self.splits.get(ALL_ROWS)


def pick(values: Values, goal: Goal) -> Value:
    """A goal's value.

    Raises:
        RecipeError: the task has no such metric.
    """
    metrics = values[goal.task]
    if not goal.metric:
        return next(iter(metrics.values()))
    if goal.metric not in metrics:
        message = f"{goal.task} has no metric '{goal.metric}'."
        raise RecipeError([Problem(message, "objective", hint=nearest(goal.metric, metrics))])
    return metrics[goal.metric]


def sign_of(goal: Goal, better: Better) -> float:
    """1 where lower is better, else -1."""
    if goal.goal:
        return 1.0 if goal.goal == "min" else -1.0
    return 1.0 if better == "lower" else -1.0


def _check_goal(values: dict[str, Any], node: Node, key: str, reader: Reader) -> None:
    if values.get("margin") and not values.get("no_worse_than"):
        message = "means nothing without no_worse_than."
        reader.refuse(node.value["margin"], f"{key}.margin", message)


_HAS_MARGIN = {"required": ["margin"], "properties": {"margin": {"not": {"const": 0}}}}
OBJECTIVE = EvaluationForm(
    TaskForm(
        {
            "split": Key(
                Plain(SplitName),
                "search scores candidates, validation chooses among the best, test reports",
                "search",
            ),
            **keys_of(Goal),
        },
        _check_goal,
        "goal",
        {"if": _HAS_MARGIN, "then": {"required": ["no_worse_than"]}},
    )
)


def parse_objective(recipe: Recipe) -> SearchObjective:
    """The recipe's `objective`: a list of tasks, or a mapping with `tasks` and settings.

    Raises:
        RecipeError: every problem, with file, line and column.
    """
    root = recipe.objective
    assert root is not None, "check_recipe refuses a recipe that searches without an objective"
    reader = Reader(recipe.file, recipe.folder, mergekit=False)
    values = OBJECTIVE.read(root, "objective", reader)
    splits = {} if values is REFUSED else _splits(values, root, recipe, reader)
    if reader.problems:
        unique = dict.fromkeys(reader.problems)
        raise RecipeError(sorted(unique, key=lambda p: (p.line, p.column, p.key)))
    return SearchObjective(splits)


def _splits(
    values: Mapping[str, Any], root: Node, recipe: Recipe, reader: Reader
) -> dict[SplitName, Split]:
    """The tasks by split; what is wrong with them together is in the reader's problems."""
    listed, key = root, "objective"
    if isinstance(root.value, dict):
        listed, key = root.value.get("tasks", root), "objective.tasks"
    settings = {**values, "seed": values.get("seed") or recipe.seed}
    complete = not reader.problems  # otherwise a split may lack what was refused
    result: dict[SplitName, Split] = {}
    for name in SPLITS:
        entries = [e for e in values.get("tasks", ()) if e.extra.get("split", "search") == name]
        if not entries:
            continue
        goals = tuple(_goal(entry, recipe, reader) for entry in entries)
        refuse_equal_names(entries, key, reader)
        spec = replace(spec_of(entries, settings, recipe.file), cache=False)
        result[name] = Split(name, spec, goals)
        if complete and not result[name].weighted:
            reader.refuse(listed, key, f"no task of the split `{name}` has a weight.")
    if complete and "search" not in result:
        reader.refuse(listed, key, "no task is of the split `search`.", "It is the default.")
    return result


def _goal(entry: TaskEntry, recipe: Recipe, reader: Reader) -> Goal:
    values = {name: value for name, value in entry.extra.items() if name != "split"}
    goal = Goal(entry.task.name, **values)
    if goal.no_worse_than and recipe.base_model is None:
        message = "there is no base_model to compare with."
        node = entry.node.value["no_worse_than"]
        reader.refuse(node, f"{entry.key}.no_worse_than", message)
    metrics = entry.task.metrics
    if goal.metric and metrics and goal.metric not in metrics:
        message = f"{entry.task.kind} has no metric '{goal.metric}'."
        hint = nearest(goal.metric, metrics)
        reader.refuse(entry.node.value["metric"], f"{entry.key}.metric", message, hint)
    return goal
