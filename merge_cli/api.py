"""The façade's functions: what a notebook or another program calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from merge_cli.documents import MergeResult, merge_plan, on_cluster
from merge_cli.engine.device import device_here
from merge_cli.options import MergeOptions, OnProgress, Progress, ignore_progress
from merge_cli.planning.plan import Plan
from merge_cli.planning.planner import DEFAULT_SHARD_SIZE, load_recipe
from merge_cli.planning.stages import plan_recipe
from merge_cli.recipe.schema import Recipe

# What evaluates is imported where it is asked for: it takes as long as a small merge.
if TYPE_CHECKING:
    from merge_cli.evaluation.quality_check import QualityCheck
    from merge_cli.evaluation.spec import EvalSpec
    from merge_cli.evaluation.task import Task

AnyRecipe = Recipe | str | Path | Mapping[str, Any]
Tasks: TypeAlias = "str | Path | EvalSpec | Sequence[str | Path | Task]"


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
