"""Calibration as a preparation: statistics of every source over its data, from the cache or new."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_cli.calibration.checks import calibration_problems, calibration_warnings
from merge_cli.errors import Problem
from merge_cli.methods.method import Method
from merge_cli.planning.preparation import Preparation, Prepared

if TYPE_CHECKING:
    from rich.console import Console

    from merge_cli.calibration.plan import CalibrationPlan
    from merge_cli.options import MergeOptions, OnProgress
    from merge_cli.planning.plan import Plan
    from merge_cli.recipe.schema import Recipe
    from merge_cli.report.page import Section


class Calibration:
    """See `planning.preparation.Preparation`."""

    name, section = "calibration", "gathering"
    does = "looks at examples first"
    parameter_hint = ""
    finds_method = False

    def check(self, recipe: Recipe, method: Method) -> Iterator[Problem]:
        return calibration_problems(recipe, method)

    def warnings(self, recipe: Recipe, method: Method) -> Iterator[str]:
        return calibration_warnings(recipe, method)

    def applies(self, plan: Plan) -> bool:
        return bool(plan.method.gathers) and plan.calibrated is None

    def plan(self, plan: Plan, options: MergeOptions) -> CalibrationPlan | None:
        from merge_cli.calibration.plan import plan_calibration
        from merge_cli.data.sequences import source_rows

        if any(source.planned for source in plan.sources):
            for _ in source_rows(plan.recipe):
                pass
            return None
        return plan_calibration(plan, options.device)

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

        return Prepared(
            calibrate(plan, options, on_progress, lambda: check_target(plan, target, options))
        )

    def identity(self, plan: Plan, device: str) -> bytes:
        return b""  # the key of the work has examples and settings

    def contents_used(self, recipe: Recipe) -> set[bytes]:
        from merge_cli.data.sequences import source_contents

        return source_contents(recipe)

    def plan_json(self, decided: CalibrationPlan) -> dict[str, Any]:
        from merge_cli.calibration.panel import calibration_json

        return calibration_json(decided)

    def print_plan(self, out: Console, decided: CalibrationPlan) -> None:
        from merge_cli.calibration.panel import print_calibration

        print_calibration(out, decided)

    def undecided(self, recipe: Recipe) -> Mapping[str, str]:
        return {}

    def options_json(self, method: Method) -> dict[str, Any]:
        from merge_cli.calibration.panel import statistics_json

        return {"statistics": statistics_json(method.gathers)}

    def print_options(self, out: Console, method: Method) -> None:
        from merge_cli.calibration.panel import print_statistics

        print_statistics(out, method.gathers)

    def print_result(self, out: Console, report: Mapping[str, Any]) -> None:
        if "gathered" in report:
            from merge_cli.calibration.panel import print_gathered

            print_gathered(out, report["gathered"])

    def summary(self, plan: Plan) -> dict[str, Any]:
        if plan.calibrated is None:
            return {}
        from merge_cli.calibration.report import calibration_summary

        return {"gathered": calibration_summary(plan, plan.calibrated)}

    def conclusion(self, report: Mapping[str, Any]) -> str:
        return ""

    def report_sections(self, report: Mapping[str, Any]) -> Sequence[Section]:
        return ()


PREPARATION: Preparation = Calibration()
