"""A search as a preparation: parameters, or members, found by what the merged model is worth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_cli.errors import Problem
from merge_cli.evolve.checks import search_problems
from merge_cli.methods.method import Method
from merge_cli.methods.registry import get_method
from merge_cli.planning.preparation import Preparation, Prepared

if TYPE_CHECKING:
    from rich.console import Console

    from merge_cli.evolve.plan import SearchPlan
    from merge_cli.options import MergeOptions, OnProgress
    from merge_cli.planning.plan import Plan
    from merge_cli.recipe.schema import Recipe
    from merge_cli.report.page import Section


class Searching:
    """See `planning.preparation.Preparation`."""

    name, section = "search", "search"
    does = "finds its parameters itself"
    parameter_hint = "What is searched is said under `search:`."
    finds_method = True

    def check(self, recipe: Recipe, method: Method) -> Iterator[Problem]:
        searching = get_method(recipe.merge_method).searches  # `method` is the one that is searched
        return search_problems(recipe, searching=searching)

    def warnings(self, recipe: Recipe, method: Method) -> Iterator[str]:
        yield from ()

    def applies(self, plan: Plan) -> bool:
        return plan.recipe.searches

    def plan(self, plan: Plan, options: MergeOptions) -> SearchPlan | None:
        from merge_cli.evolve.plan import plan_objective, plan_search

        if any(source.planned for source in plan.sources):
            plan_objective(plan.recipe, options)
            return None
        return plan_search(plan, options)

    def run(
        self,
        plan: Plan,
        target: Path,
        options: MergeOptions,
        on_progress: OnProgress,
        *,
        require_improvement: bool = False,
    ) -> Prepared:
        from merge_cli.calibration.run import calibrate
        from merge_cli.engine.merge import check_target
        from merge_cli.evolve.run import search
        from merge_cli.planning.planner import make_plan

        check_target(plan, target, options)
        result = search(
            plan, target, options, on_progress=on_progress, require_improvement=require_improvement
        )
        resolved = make_plan(result.recipe, shard_size=plan.shard_size)
        if resolved.method.gathers:  # the best was Fisher merging
            resolved = calibrate(resolved, options, on_progress)
        record = {"search": result.record}
        return Prepared(resolved, record, result.attachments, discard=result.folder.discard)

    def identity(self, plan: Plan, device: str) -> bytes:
        from merge_cli.evolve.journal import search_fingerprint

        return search_fingerprint(plan, device).encode()

    def contents_used(self, recipe: Recipe) -> set[bytes]:
        from merge_cli.evolve.splits import contents_searched

        return contents_searched(recipe)

    def plan_json(self, decided: SearchPlan) -> dict[str, Any]:
        from merge_cli.evolve.panel import search_json

        return search_json(decided)

    def print_plan(self, out: Console, decided: SearchPlan) -> None:
        from merge_cli.evolve.panel import print_search

        print_search(out, decided)

    def undecided(self, recipe: Recipe) -> Mapping[str, str]:
        if recipe.search is None or not recipe.searches:
            return {}
        return {p.name: f"{p.name} {p.allowed} (searched)" for p in recipe.search.parameters}

    def options_json(self, method: Method) -> dict[str, Any]:
        return {}

    def print_options(self, out: Console, method: Method) -> None:
        from merge_cli.evolve.panel import print_keys

        print_keys(out, method.name)

    def print_result(self, out: Console, report: Mapping[str, Any]) -> None:
        if "search" in report:
            from merge_cli.evolve.panel import print_searched

            print_searched(out, report["search"])

    def summary(self, plan: Plan) -> dict[str, Any]:
        return {}

    def conclusion(self, report: Mapping[str, Any]) -> str:
        if "search" not in report:
            return ""
        from merge_cli.evolve.report import worth

        return worth(report["search"])

    def report_sections(self, report: Mapping[str, Any]) -> Sequence[Section]:
        if not report.get("search"):
            return ()
        from merge_cli.evolve.report import search_sections

        return search_sections(report)


PREPARATION: Preparation = Searching()
