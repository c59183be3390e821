"""Trying methods as a preparation: which one merges, and with which numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_cli.auto.checks import automatic_problems
from merge_cli.errors import Problem
from merge_cli.methods.method import Method
from merge_cli.methods.registry import get_method
from merge_cli.planning.preparation import Preparation, Prepared

if TYPE_CHECKING:
    from rich.console import Console

    from merge_cli.auto.plan import AutomaticPlan
    from merge_cli.options import MergeOptions, OnProgress
    from merge_cli.planning.plan import Plan
    from merge_cli.recipe.schema import Recipe
    from merge_cli.report.page import Section


class Automatic:
    """See `planning.preparation.Preparation`."""

    name, section = "automatic", "auto"
    does = "chooses a method and its numbers itself"
    parameter_hint = "auto chooses the method and its numbers by itself."
    finds_method = True

    def check(self, recipe: Recipe, method: Method) -> Iterator[Problem]:
        return automatic_problems(recipe, method)

    def warnings(self, recipe: Recipe, method: Method) -> Iterator[str]:
        yield from ()

    def applies(self, plan: Plan) -> bool:
        return get_method(plan.recipe.merge_method).automatic

    def plan(self, plan: Plan, options: MergeOptions) -> AutomaticPlan | None:
        from merge_cli.auto.plan import plan_automatic
        from merge_cli.data.sequences import source_rows

        if any(source.planned for source in plan.sources):
            for _ in source_rows(plan.recipe):
                pass
            return None
        return plan_automatic(plan, options)

    def run(
        self,
        plan: Plan,
        target: Path,
        options: MergeOptions,
        on_progress: OnProgress,
        *,
        require_improvement: bool = False,
    ) -> Prepared:
        from merge_cli.auto.run import find_best
        from merge_cli.engine.merge import check_target

        check_target(plan, target, options)
        result = find_best(
            plan, target, options, on_progress, require_improvement=require_improvement
        )
        return Prepared(
            result.plan, {"auto": result.record}, folders=result.folders, discard=result.discard
        )

    def identity(self, plan: Plan, device: str) -> bytes:
        from merge_cli.auto.plan import plan_automatic
        from merge_cli.options import MergeOptions

        decided = plan_automatic(plan, MergeOptions(device=device))
        return f"{decided.key} {decided.budget}".encode()

    def contents_used(self, recipe: Recipe) -> set[bytes]:
        from merge_cli.data.sequences import source_contents

        return source_contents(recipe)

    def plan_json(self, decided: AutomaticPlan) -> dict[str, Any]:
        from merge_cli.auto.panel import automatic_json

        return automatic_json(decided)

    def print_plan(self, out: Console, decided: AutomaticPlan) -> None:
        from merge_cli.auto.panel import print_automatic

        print_automatic(out, decided)

    def undecided(self, recipe: Recipe) -> Mapping[str, str]:
        return {"*": "chosen by data"}

    def options_json(self, method: Method) -> dict[str, Any]:
        from merge_cli.auto.panel import options_json

        return options_json()

    def print_options(self, out: Console, method: Method) -> None:
        from merge_cli.auto.panel import print_options

        print_options(out)

    def print_result(self, out: Console, report: Mapping[str, Any]) -> None:
        if "auto" in report:
            from merge_cli.auto.panel import print_path

            print_path(out, report["auto"])

    def summary(self, plan: Plan) -> dict[str, Any]:
        return {}

    def conclusion(self, report: Mapping[str, Any]) -> str:
        return str(report["auto"]["sentence"]) if "auto" in report else ""

    def report_sections(self, report: Mapping[str, Any]) -> Sequence[Section]:
        if not report.get("auto"):
            return ()
        from merge_cli.auto.report import automatic_sections

        return automatic_sections(report)


PREPARATION: Preparation = Automatic()
