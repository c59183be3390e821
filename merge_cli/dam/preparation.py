"""Learning as a preparation: coefficients of a merge, learned by imitating its sources."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_cli.dam.checks import learning_problems, learning_warnings
from merge_cli.errors import Problem
from merge_cli.methods.method import Method
from merge_cli.planning.preparation import Preparation, Prepared

if TYPE_CHECKING:
    from rich.console import Console

    from merge_cli.dam.plan import TrainingPlan
    from merge_cli.options import MergeOptions, OnProgress
    from merge_cli.planning.plan import Plan
    from merge_cli.recipe.schema import Recipe
    from merge_cli.report.page import Section


class Learning:
    """See `planning.preparation.Preparation`."""

    name, section = "learning", "training"
    does = "finds its parameters itself"
    parameter_hint = "What is learned, and how, is said under `training:`."
    finds_method = False

    def check(self, recipe: Recipe, method: Method) -> Iterator[Problem]:
        return learning_problems(recipe, method)

    def warnings(self, recipe: Recipe, method: Method) -> Iterator[str]:
        return learning_warnings(recipe, method)

    def applies(self, plan: Plan) -> bool:
        return plan.method.learns and plan.coefficients is None

    def plan(self, plan: Plan, options: MergeOptions) -> TrainingPlan | None:
        from merge_cli.dam.plan import plan_training
        from merge_cli.data.sequences import source_rows

        if any(source.planned for source in plan.sources):
            for _ in source_rows(plan.recipe):
                pass
            return None
        return plan_training(plan, options.device)

    def run(
        self,
        plan: Plan,
        target: Path,
        options: MergeOptions,
        on_progress: OnProgress,
        *,
        require_improvement: bool = False,
    ) -> Prepared:
        from merge_cli.checkpoint.coefficients import FILE
        from merge_cli.dam.record import gate
        from merge_cli.dam.run import learn, published_report
        from merge_cli.engine.merge import check_target
        from merge_cli.planning.planner import make_plan

        report = published_report(plan, target, options)
        if report is not None:
            gate(report["training"], require_improvement, target / FILE)
            return Prepared(plan, report=report)
        check_target(plan, target, options)
        learned = learn(
            plan, target, options, on_progress=on_progress, require_improvement=require_improvement
        )
        if not learned.world.first:  # the first process of several merges
            learned.world.close()
            return Prepared(plan, report={})
        resolved = make_plan(learned.resolved(plan.recipe), shard_size=plan.shard_size)
        return Prepared(
            resolved,
            {"training": learned.record},
            folders=learned.folders,
            discard=learned.discard,
        )

    def identity(self, plan: Plan, device: str) -> bytes:
        return b""  # the key of the work has options and data

    def contents_used(self, recipe: Recipe) -> set[bytes]:
        from merge_cli.data.sequences import source_contents

        return source_contents(recipe)

    def plan_json(self, decided: TrainingPlan) -> dict[str, Any]:
        from merge_cli.dam.panel import training_json

        return training_json(decided)

    def print_plan(self, out: Console, decided: TrainingPlan) -> None:
        from merge_cli.dam.panel import print_training

        print_training(out, decided)

    def undecided(self, recipe: Recipe) -> Mapping[str, str]:
        return {}

    def options_json(self, method: Method) -> dict[str, Any]:
        from merge_cli.dam.panel import options_json

        return {"training": options_json()}

    def print_options(self, out: Console, method: Method) -> None:
        from merge_cli.dam.panel import print_options

        print_options(out)

    def print_result(self, out: Console, report: Mapping[str, Any]) -> None:
        if "training" in report:
            from merge_cli.dam.panel import print_learned

            print_learned(out, report["training"])

    def summary(self, plan: Plan) -> dict[str, Any]:
        if plan.coefficients is None:
            return {}
        from merge_cli.dam.report import coefficient_summary

        return {"coefficients": coefficient_summary(plan)}

    def conclusion(self, report: Mapping[str, Any]) -> str:
        if "training" not in report:
            return ""
        from merge_cli.dam.report import worth

        return worth(report["training"])

    def report_sections(self, report: Mapping[str, Any]) -> Sequence[Section]:
        if not (report.get("training") or report.get("coefficients")):
            return ()
        from merge_cli.dam.report import training_sections

        return training_sections(report)


PREPARATION: Preparation = Learning()
