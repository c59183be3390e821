"""`merge_cli.analyze`: open, read once, measure, judge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from merge_cli.analysis.advice import advise
from merge_cli.analysis.differences import (
    compare_routers,
    config_differences,
    stored_dtypes,
    tokenizer_difference,
)
from merge_cli.analysis.findings import Evidence, findings_of
from merge_cli.analysis.measure import Measurements, measure_models
from merge_cli.analysis.measures import GroupSums
from merge_cli.analysis.model_set import ModelSet, open_model_set, recipe_of
from merge_cli.analysis.result import Analysis, ModelFiles
from merge_cli.engine.device import choose_device
from merge_cli.engine.memory import peak_rss
from merge_cli.engine.merge import fetch_inputs
from merge_cli.errors import UsageError
from merge_cli.kernels.measures import Relations
from merge_cli.options import MergeOptions, OnProgress, ignore_progress
from merge_cli.planning.planner import load_recipe
from merge_cli.recipe.schema import Recipe
from merge_cli.tokenizer.files import read_tokenizer


def analyze(
    recipe: Recipe | str | Path | None = None,
    *,
    base: str | Path | None = None,
    models: Sequence[str | Path] = (),
    seed: int | None = None,
    options: MergeOptions | None = None,
    on_progress: OnProgress | None = None,
    show: OnProgress | None = None,
) -> Analysis:
    """Say what models are like before they are merged, from their weights and files alone.

    Every weight is read once, in blocks; memory does not grow with the models. Nothing is run.

    Args:
        recipe: a loaded recipe, or the path of one: its base and its models, whole.
        base, models: folders or Hub ids, instead of a recipe.
        seed: which matrices and which rows and columns the ranks are sampled from; the recipe's
            unless given.
        options: device, threads and memory; the rest has no effect.
        on_progress: told of progress; `show` is its old name.

    Raises:
        UsageError: neither a recipe nor models, or both; fewer than two models.
        RecipeError, SourceError, NonFiniteError, ResourceError: see `merge_cli.errors`.
    """
    if (recipe is None) == (not models):
        raise UsageError("analyze wants a recipe, or models (with a base or without one)")
    if recipe is None:
        loaded = recipe_of(str(base) if base else None, [str(model) for model in models])
    elif base:
        raise UsageError("a recipe names its own base", hint="Leave out either of them.")
    else:
        loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    if loaded.stages:
        message = "this recipe has several documents: only `run` and `plan` read them"
        raise UsageError(message, where=loaded.file, hint="Analyze its stages by themselves.")
    if seed is not None:
        loaded = loaded.with_seed(seed)
    chosen = options or MergeOptions()
    device = choose_device(chosen.device)
    subject = open_model_set(loaded)
    on_progress = on_progress or show or ignore_progress
    fetch_inputs(subject.plan, on_progress)
    result = measure_models(subject, device, chosen, on_progress)
    analysis = _analysis(subject, result, device.name)
    return replace(analysis, peak_memory=peak_rss())


def _analysis(subject: ModelSet, found: Measurements, device: str) -> Analysis:
    plan, has_base = subject.plan, subject.base is not None
    groups = GroupSums(plan.tasks, found.sums, base=has_base)
    tokenizers = [read_tokenizer(source) for source in plan.sources]
    names = (subject.base, *subject.models) if subject.base is not None else subject.models
    differences = tuple(
        tokenizer_difference(name, tokenizers[0], own)
        for name, own in zip(names[1:], tokenizers[1:], strict=True)
    )
    problems = tuple(str(problem) for problem in subject.problems)
    total, kinds = groups.total(), groups.kinds()
    sparsity = _sparsity_where_changed(found.sums, len(subject.models)) if has_base else None
    evidence = Evidence(
        base=subject.base,
        models=subject.models,
        total=total,
        inner=groups.inner(),
        kinds=kinds,
        spectra=found.spectra,
        sparsity=sparsity,
        problems=problems,
        tokenizers=differences,
        routers=compare_routers(names, [source.tensors for source in plan.sources]),
    )
    judged = findings_of(evidence)
    return Analysis(
        base=subject.base,
        models=subject.models,
        files=_files(subject, names),
        compared=len(plan.tasks),
        tensors=subject.tensors,
        problems=problems,
        notes=plan.notes,
        total=total,
        inner=evidence.inner,
        layers=groups.layers(),
        kinds=kinds,
        cells=groups.cells(),
        each=groups.each(),
        spectra=found.spectra,
        sparsity_where_changed=sparsity,
        config=config_differences(plan.sources),
        tokenizers=differences,
        verdicts=judged,
        advice=advise(evidence, judged, plan.recipe),
        seed=plan.recipe.seed,
        device=device,
        threads=found.threads,
        seconds=round(found.seconds, 3),
        bytes_read=plan.bytes_read,
        peak_memory=0,
    )


def _sparsity_where_changed(sums: Sequence[Relations], sources: int) -> tuple[float | None, ...]:
    """For each source, the unchanged share of those tensors that it changed at all.

    Over the whole model it would say how many tensors were frozen.
    """
    shares: list[float | None] = []
    for s in range(sources):
        touched = [one for one in sums if one.both[s, s]]
        count = sum(item.count for item in touched)
        changed = sum(int(one.both[s, s]) for one in touched)
        shares.append(float(f"{1 - changed / count:.6g}") if count else None)
    return tuple(shares)


def _files(subject: ModelSet, names: Sequence[str]) -> tuple[ModelFiles, ...]:
    return tuple(
        ModelFiles(
            model=name,
            reference=source.label,
            revision=source.revision,
            tensors=len(source.tensors),
            parameters=sum(ref.size for ref in source.tensors.values()),
            bytes=sum(ref.nbytes for ref in source.tensors.values()),
            dtypes=dtypes,
        )
        for name, source, dtypes in zip(
            names, subject.sources, stored_dtypes(subject.sources), strict=True
        )
    )
