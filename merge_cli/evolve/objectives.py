"""The objective of a search: tasks on three splits, with weights, directions and constraints.

An objective is a list of tasks as in an evaluation file, with further keys for weight and goal.
Scores are sums of weight * value / sum of weights, and lower is always better.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from merge_cli.errors import Problem, RecipeError
from merge_cli.evaluation.parse import parse_eval
from merge_cli.evaluation.result import Better
from merge_cli.evaluation.spec import EvalSpec
from merge_cli.evaluation.tasks import KINDS
from merge_cli.recipe.fields import nearest
from merge_cli.recipe.nodes import Node
from merge_cli.recipe.schema import Recipe

SplitName = Literal["search", "validation", "test"]
SPLITS: tuple[SplitName, ...] = ("search", "validation", "test")
_OWN = ("weight", "split", "metric", "goal", "at_most", "at_least", "no_worse_than", "margin")


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
    metric: str = ""
    weight: float = 1.0
    goal: str = ""
    at_most: float | None = None
    at_least: float | None = None
    no_worse_than: str = ""
    margin: float = 0.0


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

    def score(self, values: Values, base: Values | None = None) -> CandidateScore:
        """The score of a candidate, from its tasks' values.

        Args:
            base: the base model's values, for goals with `no_worse_than`.
        """
        parts, violation = [], 0.0
        total_weight = math.fsum(goal.weight for goal in self.weighted)
        for goal in self.goals:
            value = pick(values, goal)
            sign = _sign(goal, value.better)
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
        return self.splits[[name for name in SPLITS if name in self.splits][-1]]


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


def _sign(goal: Goal, better: Better) -> float:
    if goal.goal:
        return 1.0 if goal.goal == "min" else -1.0
    return 1.0 if better == "lower" else -1.0


def parse_objective(recipe: Recipe) -> SearchObjective:
    """The recipe's `objective`: a list of tasks, or a mapping with `tasks` and settings.

    Raises:
        RecipeError: every problem, with file, line and column.
    """
    root = recipe.objective
    assert root is not None, "check_recipe refuses a recipe that searches without an objective"
    parser = _ObjectiveParser(recipe)
    objective = parser.objective(root)
    if parser.problems or objective is None:
        unique = dict.fromkeys(parser.problems)
        raise RecipeError(sorted(unique, key=lambda p: (p.line, p.column, p.key)))
    return objective


class _ObjectiveParser:
    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self.problems: list[Problem] = []

    def objective(self, root: Node) -> SearchObjective | None:
        settings: dict[str, Node] = {}
        listed, key = root, "objective"
        if isinstance(root.value, dict):
            settings = {name: node for name, node in root.value.items() if name != "tasks"}
            listed, key = root.value.get("tasks", Node([], root.line, root.column)), key + ".tasks"
        if not isinstance(listed.value, list) or not listed.value:
            self._add(listed, key, "must be a list of at least one task.")
            return None
        by_split: dict[SplitName, tuple[list[Node], list[dict[str, Any]], list[int]]] = {
            name: ([], [], []) for name in SPLITS
        }
        for i, node in enumerate(listed.value):
            plain, own = self._divided(node, f"{key}[{i}]")
            nodes, owns, places = by_split[own.pop("split", "search")]
            nodes.append(plain)
            owns.append(own)
            places.append(i)
        splits = {}
        for name, (nodes, owns, places) in by_split.items():
            if not nodes:
                continue
            children = {**settings, "tasks": Node(nodes, listed.line, listed.column)}
            spec = self._spec(Node(children, root.line, root.column, root.key_places), key, places)
            if spec is not None and len(spec.tasks) == len(owns):
                named = zip(spec.tasks, owns, strict=True)
                goals = tuple(Goal(task.name, **own) for task, own in named)
                splits[name] = Split(name, spec, goals)
                self._check_metrics(splits[name], nodes, key, places)
        if "search" not in splits:
            if not self.problems:
                self._add(listed, key, "no task is of the split `search`.", "It is the default.")
            return None
        for name, split in splits.items():
            if not split.weighted:
                self._add(listed, key, f"no task of the split `{name}` has a weight.")
        return SearchObjective(splits)

    def _spec(self, root: Node, key: str, places: Sequence[int]) -> EvalSpec | None:
        try:
            spec = parse_eval(root, self._recipe.file, self._recipe.folder)
        except RecipeError as error:
            for problem in error.problems:
                # The task's place in the whole list, not in its split's.
                path = problem.key
                for there, here in enumerate(places):
                    if path.startswith(f"tasks[{there}]"):
                        path = f"{key}[{here}]" + path.removeprefix(f"tasks[{there}]")
                        break
                else:
                    path = key if path == "tasks" else f"objective.{path}"
                self.problems.append(replace(problem, key=path))
            return None
        return (
            replace(spec, cache=False)
            if spec.seed
            else replace(spec, cache=False, seed=self._recipe.seed)
        )

    def _divided(self, node: Node, key: str) -> tuple[Node, dict[str, Any]]:
        """A task as evaluation files have it, and what is ours."""
        if not isinstance(node.value, dict):
            return node, {}
        own: dict[str, Any] = {}
        rest: dict[str, Node] = {}
        named = node.value.get("task")
        word = (
            named.value
            if named
            else next((k for k in ("lm_eval", "python") if k in node.value), None)
        )
        kind = KINDS.get(word) if isinstance(word, str) else None
        known = (
            {"task", *_OWN, *(f.name for f in fields(kind) if f.name != "folder")} if kind else None
        )
        for name, child in node.value.items():
            if name in _OWN:
                value = self._own(name, child, f"{key}.{name}")
                if value is not None:
                    own[name] = value
            elif known is not None and name not in known:
                line, column = node.key_places[name]
                self.problems.append(
                    Problem(
                        "unknown key.",
                        f"{key}.{name}",
                        self._recipe.file,
                        line,
                        column,
                        nearest(name, known),
                    )
                )
            else:
                rest[name] = child
        if own.get("margin") and not own.get("no_worse_than"):
            self._add(node.value["margin"], f"{key}.margin", "means nothing without no_worse_than.")
        if own.get("no_worse_than") and self._recipe.base_model is None:
            message = "there is no base_model to compare with."
            self._add(node.value["no_worse_than"], f"{key}.no_worse_than", message)
        return Node(rest, node.line, node.column, node.key_places), own

    def _own(self, name: str, node: Node, key: str) -> Any:
        value = node.value
        words = {"split": SPLITS, "goal": ("min", "max"), "no_worse_than": ("base",)}
        if name in words:
            if value in words[name]:
                return value
            self._add(
                node,
                key,
                f"must be {' or '.join(words[name])} (got {node.plain()!r}).",
                nearest(str(value), words[name]) if len(words[name]) > 1 else "",
            )
            return None
        if name == "metric":
            if isinstance(value, str):
                return value
            self._add(node, key, f"must be text (got {node.plain()!r}).")
            return None
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and (name not in ("weight", "margin") or value >= 0):
            return float(value)
        least = " of at least 0" if name in ("weight", "margin") else ""
        self._add(node, key, f"must be a number{least} (got {node.plain()!r}).")
        return None

    def _check_metrics(
        self, split: Split, nodes: Sequence[Node], key: str, places: Sequence[int]
    ) -> None:
        for task, goal, node, place in zip(
            split.spec.tasks, split.goals, nodes, places, strict=True
        ):
            if goal.metric and task.metrics and goal.metric not in task.metrics:
                message = f"{task.kind} has no metric '{goal.metric}'."
                self._add(
                    node, f"{key}[{place}].metric", message, nearest(goal.metric, task.metrics)
                )

    def _add(self, node: Node, key: str, what: str, hint: str = "") -> None:
        problem = Problem(what, key, self._recipe.file, node.line, node.column, hint)
        self.problems.append(problem)
