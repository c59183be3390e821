"""The façade's functions: what a notebook or another program calls."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from merge_cli.checkpoint.coefficients import FILE
from merge_cli.comparison.result import Comparison
from merge_cli.comparison.run import compare as compare_recipes
from merge_cli.engine.device import choose_device
from merge_cli.engine.journal import work_key
from merge_cli.engine.merge import check_target, execute
from merge_cli.engine.merge_stats import MergeStats
from merge_cli.engine.options import MergeOptions, OnProgress, Progress
from merge_cli.engine.output import OutputWorkspace
from merge_cli.engine.stage_folder import StageWorkspace
from merge_cli.errors import UsageError
from merge_cli.evaluation.quality_check import read_gates, require
from merge_cli.evaluation.run import as_spec, spec_for
from merge_cli.evaluation.spec import EvalSpec
from merge_cli.evaluation.task import Task
from merge_cli.planning.plan import Plan
from merge_cli.planning.planner import DEFAULT_SHARD_SIZE, load_recipe, make_plan
from merge_cli.planning.stages import needed, over_results, plan_recipe, unused
from merge_cli.recipe.schema import Recipe


@dataclass(frozen=True)
class MergeResult:
    """A finished merge: its folder and the content of its merge_report.json."""

    path: Path
    report: dict[str, Any]


def plan(recipe: Recipe | str | Path, *, shard_size: int = DEFAULT_SHARD_SIZE) -> Plan:
    """Decide a merge from headers alone: every tensor, and every problem.

    Args:
        recipe: a loaded recipe, or the path of one.
        shard_size: bytes of tensors in one output file.

    Raises:
        RecipeError, SourceError, MismatchError: see `merge_cli.errors`.
    """
    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    return plan_recipe(loaded, shard_size=shard_size)


def merge(
    recipe: Recipe | Plan | str | Path,
    out: str | Path,
    *,
    shard_size: int = DEFAULT_SHARD_SIZE,
    options: MergeOptions | None = None,
    show: OnProgress = lambda progress: None,
    require_improvement: bool = False,
) -> MergeResult:
    """Merge models into the folder `out`; learn, search or gather first, if the method does.

    Args:
        recipe: a plan, a loaded recipe, or the path of one.
        out: the folder to publish; it appears only when it is complete.
        show: told of progress.
        require_improvement: what is learned or found must beat every merge that needs neither.

    Raises:
        RecipeError, SourceError, MismatchError, NonFiniteError, ResourceError, Interrupted,
        GateError: see `merge_cli.errors`. After all but the first three, the same call resumes.
    """
    decided = recipe if isinstance(recipe, Plan) else plan(recipe, shard_size=shard_size)
    options = options or MergeOptions()
    if decided.recipe.output is not None:
        from merge_cli.adapters.merging import merge_adapters

        return MergeResult(Path(out), merge_adapters(decided, Path(out), options, show=show))
    if decided.stages:
        return _merge_stages(decided, Path(out), options, show, require_improvement)
    return _merge(decided, Path(out), options, show, require_improvement, {})


def _merge_stages(
    decided: Plan, target: Path, options: MergeOptions, show: OnProgress, require_improvement: bool
) -> MergeResult:
    """Every document of a recipe, each published where the next ones find it; OUT last."""
    from merge_cli.dam.distributed import launched

    if launched() > 1:
        message = "several processes cannot share the stages of a recipe"
        raise UsageError(message, hint="Run the stages that do not learn first, by themselves.")
    kind, stages = choose_device(options.device).kind, decided.stages
    keys = {name: work_key(stage, kind, options.statistics) for name, stage in stages.items()}
    results = unused(decided)
    with StageWorkspace(target) as folder:
        if options.fresh:
            folder.clear()
        todo = [name for name in stages if not folder.has(name, keys[name])]
        known = finished(decided, target, options) if folder.begun and not options.fresh else None
        if known is None:
            check_target(decided, target, options)
            sizes = [stages[name].bytes_written for name in todo]
            OutputWorkspace(target).check_space(sum(sizes) + decided.bytes_written)
        places = {name: folder.place(name) for name in stages}

        def make(plan: Plan, out: Path, options: MergeOptions) -> MergeResult:
            used = {name: places[name] for name in needed(plan)}
            over = over_results(plan, places)
            return _merge(over, out, options, show, require_improvement, used)

        for number, (name, stage) in enumerate(stages.items(), start=1):
            there = "" if name in todo else ": made before"
            show(Progress("stage", 0, 0, f"stage {number} of {len(stages)}: {name}{there}"))
            if not there and (known is None or name in results):
                folder.begin(name, keys[name])
                if finished(stage, places[name], options) is None:
                    make(stage, places[name], replace(options, overwrite=True))
                folder.finished(name, keys[name])
        result = known or make(decided, target, options)
        folder.tidy(stages if options.keep_stages else results)
    return result


def _merge(
    decided: Plan,
    target: Path,
    options: MergeOptions,
    show: OnProgress,
    require_improvement: bool,
    stages: Mapping[str, Path],
) -> MergeResult:
    """One document; `stages` are the folders of what other documents have made for it."""
    from merge_cli.report.write import write_reports

    report: dict[str, Any] = {}
    learned = None
    if decided.learns:
        from merge_cli.dam.record import gate
        from merge_cli.dam.run import learn, with_coefficients

        earlier = _published(decided, target, options)
        if earlier is not None:
            gate(earlier.report["training"], require_improvement, target / FILE)
            return earlier
        check_target(decided, target, options)
        learned = learn(
            decided, target, options, show=show, require_improvement=require_improvement
        )
        if not learned.world.first:  # the first process of several merges
            learned.world.close()
            return MergeResult(target, {})
        resolved = with_coefficients(decided.recipe, learned.coefficients, learned.record)
        decided = make_plan(resolved, shard_size=decided.shard_size)
    record = learned.record if learned is not None else None
    if decided.gathers:
        from merge_cli.calibration.run import calibrate

        plain = decided
        decided = calibrate(plain, options, show, lambda: check_target(plain, target, options))
    result = None
    if decided.recipe.searches:
        from merge_cli.evolve.run import search

        check_target(decided, target, options)
        result = search(
            decided, target, options, show=show, require_improvement=require_improvement
        )
        decided = make_plan(result.recipe, shard_size=decided.shard_size)

    def finish(of: Plan, prints: tuple[str, ...], outcome: MergeStats, folder: Path) -> None:
        extra = result.attachments if result is not None else {}
        report.update(
            write_reports(
                of,
                prints,
                outcome,
                folder,
                target.absolute(),
                record,
                search=result.record if result is not None else None,
                attachments=extra,
                stages=stages,
                card=options.model_card,
            )
        )

    path = execute(decided, target, options, show=show, finish=finish)
    if learned is not None:
        learned.folder.discard()
        learned.world.close()
    if result is not None:
        result.folder.discard()
    if not report:  # published by a process that was killed before it could say so
        report.update(json.loads((path / "merge_report.json").read_text(encoding="utf-8")))
    return MergeResult(path, report)


def _published(plan: Plan, target: Path, options: MergeOptions) -> MergeResult | None:
    """OUT, if a process that was killed before it could tidy up has made it by this very work.

    What it has left of its training goes then; and where OUT may be replaced, it goes anyway.
    """
    from merge_cli.dam.run import published, tidy, with_coefficients

    found = published(plan, target, options)
    if found is None:
        return None
    same, coefficients, record = found
    recipe = with_coefficients(plan.recipe, coefficients, record)
    resolved = make_plan(recipe, shard_size=plan.shard_size)
    result = finished(resolved, target, options) if same else None
    if result is not None and "training" not in result.report:
        result = None
    if result is not None or options.overwrite:
        tidy(target)
    return result


def finished(plan: Plan, out: str | Path, options: MergeOptions) -> MergeResult | None:
    """OUT, if it is already the result of this very merge; None for anything else.

    Of a method that learns this is never known: what OUT was learned from is not in it.
    """
    path = Path(out)
    try:
        report = json.loads((path / "merge_report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if plan.learns or not isinstance(report, dict):
        return None
    if plan.gathers:
        from merge_cli.calibration.run import known

        plan = known(plan, options.device) or plan
        if plan.gathers:
            return None
    key = work_key(plan, choose_device(options.device).kind, options.statistics)
    return MergeResult(path, report) if report.get("work") == key else None


@dataclass(frozen=True)
class ComparisonResult:
    """A finished comparison: its folder, what was found, and the content of comparison.json."""

    path: Path
    comparison: Comparison
    record: dict[str, Any]
    unmet: dict[str, list[str]] = field(default_factory=dict)

    def require_gates(self) -> None:
        """Raise a GateError if a recipe's merge does not meet a gate."""
        require(self.unmet)


def compare(
    recipes: Sequence[str | Path],
    tasks: str | Path | EvalSpec | Sequence[str | Path | Task],
    out: str | Path,
    *,
    gates: Sequence[str] = (),
    no_worse: Sequence[str] = (),
    options: Sequence[str] = (),
    show: OnProgress = lambda progress: None,
) -> ComparisonResult:
    """Merge recipes, evaluate base, parents, baselines and merges on the same data, write it down.

    Args:
        tasks: as `evaluate` takes them.
        out: the folder for merges, comparison.json, .md, .csv and .html; what is there is reused.
        gates, no_worse: conditions on every recipe's merge (docs/evaluate.md).
        options: of `merge-cli run`, for every merge.
        show: told of progress.

    Raises:
        as `comparison.run.compare` does; UsageError for a gate that cannot be read. A gate that is
        not met raises nothing here: see `ComparisonResult.require_gates`.
    """
    from merge_cli.comparison.files import write_comparison

    spec = tasks if isinstance(tasks, EvalSpec) else as_spec(tasks)
    read = read_gates(gates, no_worse, spec.tasks)
    references = [gate.reference for gate in read if gate.reference]
    result = compare_recipes(recipes, spec, out, references=references, options=options, show=show)
    return ComparisonResult(
        Path(out), result, write_comparison(result, Path(out)), result.unmet(read)
    )


def comparison_spec(
    recipes: Sequence[str | Path], eval_file: Path | None, data: Sequence[Path]
) -> EvalSpec:
    """What to compare on: flags, or else the one `eval` section that recipes have.

    Raises:
        UsageError: none, or several that differ.
    """
    if "-" in map(str, recipes):
        raise UsageError("a comparison reads recipes from files, not from standard input")
    found = [spec for path in recipes if (spec := spec_for(load_recipe(path), eval_file, data))]
    if not found:
        hint = "Give --data FILE or --eval FILE (docs/evaluate.md), or `eval:` in a recipe."
        raise UsageError("nothing to compare on", hint=hint)
    if any(spec.changed(file="") != found[0].changed(file="") for spec in found):
        hint = "Say which tasks count with --eval FILE."
        raise UsageError("the recipes have different `eval` sections", hint=hint)
    return found[0]
