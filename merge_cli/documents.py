"""A plan carried out: one document, several, a sweep or adapters; here, or on a cluster's nodes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_cli.engine.device import device_of
from merge_cli.engine.loop import run_loop
from merge_cli.engine.made_before import made_before, read_report, request_key
from merge_cli.engine.merge import Run, execute
from merge_cli.engine.merge_stats import MergeStats
from merge_cli.engine.stages import make_stages
from merge_cli.errors import UsageError
from merge_cli.methods.registry import get_method
from merge_cli.options import MergeOptions, OnProgress
from merge_cli.planning.plan import Plan
from merge_cli.planning.preparation import prepare


@dataclass(frozen=True)
class MergeResult:
    """A finished merge.

    Attributes:
        path: its folder.
        report: the content of its merge_report.json, of a sweep with the variants' own under
            `sweep`; empty in all but the first of the processes
            that have trained together.
        made_before: whether OUT was this very merge already, and was only evaluated.
        evaluation: what evaluating it has found, as in its merge_evaluation.json, OUT first; None
            where nothing asked for it.
    """

    path: Path
    report: dict[str, Any]
    evaluation: list[dict[str, Any]] | None = None
    made_before: bool = False

    def _repr_html_(self) -> str | None:
        """The report's page, in a notebook."""
        from merge_cli.report.notebook import framed

        return framed(self.path / "merge_report.html")


def merge_plan(
    plan: Plan,
    target: Path,
    options: MergeOptions,
    on_progress: OnProgress,
    *,
    require_improvement: bool = False,
    resume_evaluation: bool = False,
) -> MergeResult:
    """Merge a plan of one document or several, or of adapters, without evaluating it.

    Args:
        resume_evaluation: an OUT that is this very merge already is as good: the run that made it
            was interrupted while it was evaluated.

    Raises:
        as `merge` does.
    """
    path = Path(os.path.realpath(target))
    made = [plan, *plan.stages.values()]
    if options.accept_best and not any(get_method(p.recipe.merge_method).automatic for p in made):
        message = "accepting the best so far is for `merge_method: auto`"
        raise UsageError(message, hint="Leave --accept-best out.")
    if resume_evaluation and not (options.overwrite or options.fresh):
        report = made_before(plan, target, options)
        if report is not None:
            return MergeResult(path, report, made_before=True)
    if plan.recipe.output is not None and options.ray is None:
        from merge_cli.adapters.merging import merge_adapters

        return MergeResult(target, merge_adapters(plan, target, options, on_progress=on_progress))
    with runner_for(plan, options, target) as run:

        def make_document(
            plan: Plan,
            target: Path,
            options: MergeOptions,
            stages: Mapping[str, Path],
            request: str,
        ) -> dict[str, Any]:
            return _merge_document(
                plan, target, options, on_progress, require_improvement, stages, request, run
            )

        if plan.variants:
            return MergeResult(path, _merge_sweep(plan, target, options, on_progress, run))
        if not plan.stages:
            request = request_key(plan, options)
            return MergeResult(path, make_document(plan, target, options, {}, request))
        if _processes() > 1:
            message = "several processes cannot share the stages of a recipe"
            raise UsageError(message, hint="Run the stages that do not learn first, by themselves.")
        return MergeResult(path, make_stages(plan, target, options, on_progress, make_document))


def _merge_sweep(
    plan: Plan, target: Path, options: MergeOptions, on_progress: OnProgress, run: Run
) -> dict[str, Any]:
    """Merge all variants in one pass, and publish them together."""
    from merge_cli.report.sweep import write_sweep

    report: dict[str, Any] = {}

    def explain(plan: Plan, prints: tuple[str, ...], stats: MergeStats, folder: Path) -> None:
        at = target.absolute()
        report.update(write_sweep(plan, prints, stats, folder, at, card=options.model_card))

    execute(plan, target, options, on_progress=on_progress, finish=explain, run=run)
    if report:
        return report
    published = read_report(target)
    return {**published, "sweep": {name: read_report(target / name) for name in plan.variants}}


@contextmanager
def on_cluster(options: MergeOptions) -> Iterator[None]:
    """Connected to the Ray cluster of the options, if they name one.

    Before any model is opened, so that a cluster that is not there is told at once.

    Raises:
        UsageError: not an address, or a device that cannot be chosen there.
        ResourceError: the cluster cannot be reached.
    """
    if options.ray is None:
        yield
        return
    from merge_cli.cluster.connection import connected

    device_of(options)
    with connected(options.ray):
        yield


@contextmanager
def runner_for(plan: Plan, options: MergeOptions, target: Path) -> Iterator[Run]:
    """What merges the plan's chunks: this process, or the nodes of a cluster.

    Raises:
        UsageError: a plan that no cluster can share, or an address that is none.
        ResourceError: the cluster cannot be reached, or its nodes cannot share OUT's folder.
    """
    if options.ray is None:
        yield run_loop
        return
    from merge_cli.cluster.run import ray_cluster

    if plan.recipe.output is not None:
        message = "adapters are small: they are merged on one machine"
        raise UsageError(message, hint="Leave --ray out.")
    if _processes() > 1:
        message = "processes of torchrun cannot share a Ray cluster"
        raise UsageError(message, hint="Train first, then merge the resolved recipe with --ray.")
    with ray_cluster(options, target) as cluster:
        yield cluster.run


def _processes() -> int:
    """How many processes torchrun has started for this run."""
    from merge_cli.dam.distributed import launched

    return launched()


def _merge_document(
    plan: Plan,
    target: Path,
    options: MergeOptions,
    on_progress: OnProgress,
    require_improvement: bool,
    stages: Mapping[str, Path],
    request: str,
    run: Run,
) -> dict[str, Any]:
    """Prepare, execute and publish one document.

    Args:
        stages: the folders of what it is made of.
        request: what the report says that was asked for (`request_key`).
    """
    from merge_cli.report.write import write_reports

    prepared = prepare(plan, target, options, on_progress, require_improvement=require_improvement)
    if prepared.report is not None:
        return dict(prepared.report)
    report: dict[str, Any] = {}

    def explain(plan: Plan, prints: tuple[str, ...], stats: MergeStats, folder: Path) -> None:
        about = {
            "record": {**prepared.record, **({"request": request} if request else {})},
            "attachments": prepared.attachments,
            "folders": prepared.folders,
            "stages": stages,
        }
        at = target.absolute()
        report.update(
            write_reports(plan, prints, stats, folder, at, **about, card=options.model_card)
        )

    execute(
        prepared.plan,
        target,
        options,
        on_progress=on_progress,
        finish=explain,
        more_bytes=prepared.size,
        run=run,
    )
    prepared.discard()
    # Empty: a process that was killed before it could say so has published it.
    return report or read_report(target)
