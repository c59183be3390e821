"""The façade's functions: what a notebook or another program calls."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from merge_cli.engine.device import device_here, device_of
from merge_cli.engine.loop import run_loop
from merge_cli.engine.made_before import made_before, read_report, request_key
from merge_cli.engine.merge import Run, execute
from merge_cli.engine.merge_stats import MergeStats
from merge_cli.engine.stages import make_stages
from merge_cli.errors import UsageError
from merge_cli.methods.registry import get_method
from merge_cli.options import MergeOptions, OnProgress, Progress, ignore_progress
from merge_cli.planning.plan import Plan
from merge_cli.planning.planner import DEFAULT_SHARD_SIZE, load_recipe
from merge_cli.planning.preparation import prepare
from merge_cli.planning.stages import plan_recipe
from merge_cli.recipe.schema import Recipe

# What evaluates is imported where it is asked for: it takes as long as a small merge.
if TYPE_CHECKING:
    from merge_cli.evaluation.quality_check import QualityCheck
    from merge_cli.evaluation.spec import EvalSpec
    from merge_cli.evaluation.task import Task

AnyRecipe = Recipe | str | Path | Mapping[str, Any]
Tasks: TypeAlias = "str | Path | EvalSpec | Sequence[str | Path | Task]"


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


def plan(recipe: AnyRecipe, *, shard_size: int = DEFAULT_SHARD_SIZE) -> Plan:
    """Decide a merge from headers alone: every tensor, and every problem.

    Args:
        recipe: a loaded recipe, the path of one, or a mapping with the keys of one, whose relative
            paths start at the working directory.
        shard_size: bytes of tensors in one output file.

    Raises:
        RecipeError, SourceError, MismatchError: see `merge_cli.errors`.
    """
    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    return plan_recipe(loaded, shard_size=shard_size)


def merge(
    recipe: AnyRecipe | Plan,
    out: str | Path,
    *,
    shard_size: int = DEFAULT_SHARD_SIZE,
    options: MergeOptions | None = None,
    on_progress: OnProgress | None = None,
    require_improvement: bool = False,
    evaluation: Tasks | None = None,
    gates: Sequence[str] = (),
    no_worse: Sequence[str] = (),
    on_evaluation: OnProgress = ignore_progress,
) -> MergeResult:
    """Merge models into the folder `out`, and evaluate the result where the recipe asks for it.

    A method that learns, searches or calibrates does that first. Everything that can be wrong with
    recipe, data, tasks and gates is found before any weights are downloaded.

    Args:
        recipe: a plan, a loaded recipe, the path of one, or a mapping with the keys of one.
        out: the folder to publish; it appears only when it is complete.
        on_progress: called with each progress.
        require_improvement: what is learned or searched must beat every merge without it.
        evaluation: what to evaluate the result on, as `evaluate` takes it; default the recipe's
            `eval:`, if it has one.
        gates, no_worse: conditions on the evaluation (docs/evaluate.md).
        on_evaluation: called with the progress of the evaluation.

    Raises:
        RecipeError, SourceError, MismatchError, UsageError: before anything is downloaded, as far
            as it can be known then.
        NonFiniteError, ResourceError, Interrupted: the same call resumes.
        GateError: the result does not improve, or does not meet a gate; in the second case it is
            published all the same.
    """
    on_progress = on_progress or ignore_progress
    loaded = recipe if isinstance(recipe, Recipe | Plan) else load_recipe(recipe)
    written = loaded if isinstance(loaded, Recipe) else loaded.recipe
    options = (options or MergeOptions()).on_engine(written.engine)
    if options.ray is None:
        options = replace(options, device=device_here(options.device))
    check = _quality_check(written, evaluation, gates, no_worse)
    with on_cluster(options):
        decided = loaded if isinstance(loaded, Plan) else plan(loaded, shard_size=shard_size)
        for note in check.check(decided, Path(out)) if check else ():
            on_progress(Progress("evaluate", 0, 0, note))
        result = merge_plan(
            decided,
            Path(out),
            options,
            on_progress,
            require_improvement=require_improvement,
            resume_evaluation=check is not None,
        )
    if check is None or not result.report:
        return result
    models = check.run(decided, result.path, options, on_evaluation)
    check.require()
    return replace(result, evaluation=models)


def _quality_check(
    recipe: Recipe, evaluation: Tasks | None, gates: Sequence[str], no_worse: Sequence[str]
) -> QualityCheck | None:
    """What the merge is to be evaluated on; None where nothing asks for it."""
    if evaluation is None and not gates and not no_worse and not recipe.eval:
        return None
    from merge_cli.evaluation.quality_check import quality_check
    from merge_cli.evaluation.run import as_spec

    spec = None if evaluation is None else as_spec(evaluation)
    return quality_check(recipe, spec, gates, no_worse)


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
