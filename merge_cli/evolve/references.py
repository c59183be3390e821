"""The models that a search begins from, evaluated as they are: base and sources."""

from __future__ import annotations

from dataclasses import replace

from merge_cli.evaluation.result import Metric, TaskResult
from merge_cli.evaluation.run import evaluate_source
from merge_cli.evolve.evaluator import reduced
from merge_cli.evolve.jobs import goal_metrics, values_of
from merge_cli.evolve.objectives import Split, Values
from merge_cli.planning.plan import Plan
from merge_cli.sources.source import Source, fetch_weights


class References:
    """Base and sources of a plan; each is evaluated once for each split."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._measured: dict[str, dict[str, TaskResult]] = {}

    def all(self) -> list[Source]:
        """The base, then every source."""
        plan = self._plan
        base = [] if plan.base is None or plan.base in plan.operands else [plan.base]
        return [plan.sources[i] for i in (*base, *plan.operands)]

    def of(self, model: int) -> Source:
        label = str(self._plan.recipe.models[model].model)
        return next(source for source in self._plan.sources if source.label == label)

    def base(self, split: Split, share: float = 1.0) -> Values | None:
        """The base's values, where a constraint compares with it, on as many of the rows."""
        plan = self._plan
        if not split.needs_base or plan.base is None:
            return None
        return self.values(plan.sources[plan.base], split, share)

    def values(self, source: Source, split: Split, share: float = 1.0) -> Values:
        """A source's own values; found in the cache, if it was evaluated before."""
        return values_of(self._results(source, split, share))

    def metrics(self, source: Source, split: Split) -> tuple[Metric, ...]:
        """A source's metric of each goal, with its examples."""
        return goal_metrics(split, self._results(source, split))

    def _results(self, source: Source, split: Split, share: float = 1.0) -> dict[str, TaskResult]:
        key = f"{split.name} {share!r} {source.label}"
        if key not in self._measured:
            fetch_weights(source, source.header_bytes)
            tasks = tuple(reduced(task, share) for task in split.spec.tasks)
            result = evaluate_source(source, replace(split.spec, tasks=tasks, cache=True))
            self._measured[key] = dict(result.tasks)
        return self._measured[key]
