"""`merge_cli.analyze`: open models, measure them, and find what stands out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from merge_cli.recipe.named_files import named_files
from merge_cli.recipe.schema import Recipe
from merge_cli.sources.result_files import refuse_replacing
from merge_cli.system.garbage import uncollected
from merge_cli.tokenizer.files import read_tokenizer


def analyze(
    recipe: Recipe | str | Path | None = None,
    *,
    base: str | Path | None = None,
    models: Sequence[str | Path] = (),
    seed: int | None = None,
    options: MergeOptions | None = None,
    on_progress: OnProgress | None = None,
    results: Mapping[str, Path | None] | None = None,
) -> Analysis:
    """Describe models before they are merged, from their weights and files alone.

    Every weight is read once, in blocks; memory does not grow with the models. No model is run.

    Args:
        recipe: a loaded recipe, or its path: its base and its complete models are compared.
        base, models: folders or Hub ids, instead of a recipe.
        seed: for sampling matrices, rows and columns for ranks; default: the recipe's.
        options: device, threads and memory; others have no effect.
        on_progress: called with progress.
        results: option -> the file that will be written of it; none may be one that is read.

    Raises:
        UsageError: neither a recipe nor models, or both; fewer than two models; a result that
            would replace what is read.
        RecipeError, SourceError, NonFiniteError, ResourceError: see `merge_cli.errors`.
    """
    if (recipe is None) == (not models):
        raise UsageError("analyze needs a recipe, or models (with or without a base)")
    if recipe is None:
        loaded = recipe_of(str(base) if base else None, [str(model) for model in models])
    elif base:
        raise UsageError("a recipe names its own base", hint="Leave out one of them.")
    else:
        loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    if loaded.stages:
        message = "this recipe has several documents: only `run` and `plan` read them"
        raise UsageError(message, where=loaded.file, hint="Analyze each stage alone.")
    if loaded.sweep:
        message = "this recipe is a sweep: only `run`, `plan` and `compare` read it"
        raise UsageError(message, where=loaded.file, hint="Analyze its models by themselves.")
    if seed is not None:
        loaded = loaded.with_seed(seed)
    on_progress = on_progress or ignore_progress
    settings = options or MergeOptions()
    device = choose_device(settings.device)
    model_set = open_model_set(loaded)
    if results:
        refuse_replacing(results, model_set.sources, named_files(loaded))
    fetch_inputs(model_set.plan, on_progress)
    measurements = measure_models(model_set, device, settings, on_progress)
    analysis = _analysis(model_set, measurements, device.name)
    return replace(analysis, peak_memory=peak_rss())


@uncollected()
def _analysis(model_set: ModelSet, measurements: Measurements, device: str) -> Analysis:
    plan, has_base = model_set.plan, model_set.base is not None
    groups = GroupSums(plan.tasks, measurements.sums, base=has_base)
    tokenizers = [read_tokenizer(source) for source in plan.sources]
    names = (model_set.base, *model_set.models) if model_set.base is not None else model_set.models
    differences = tuple(
        tokenizer_difference(name, tokenizers[0], tokenizer)
        for name, tokenizer in zip(names[1:], tokenizers[1:], strict=True)
    )
    problems = tuple(str(problem) for problem in model_set.problems)
    total, kinds = groups.total(), groups.kinds()
    sparsity = (
        _sparsity_where_changed(measurements.sums, len(model_set.models)) if has_base else None
    )
    evidence = Evidence(
        base=model_set.base,
        models=model_set.models,
        total=total,
        inner=groups.inner(),
        kinds=kinds,
        spectra=measurements.spectra,
        sparsity=sparsity,
        problems=problems,
        tokenizers=differences,
        routers=compare_routers(names, [source.tensors for source in plan.sources]),
    )
    findings = findings_of(evidence)
    return Analysis(
        base=model_set.base,
        models=model_set.models,
        files=_files(model_set, names),
        compared=len(plan.tasks),
        tensors=model_set.tensors,
        problems=problems,
        notes=plan.notes,
        total=total,
        inner=evidence.inner,
        layers=groups.layers(),
        kinds=kinds,
        cells=groups.cells(),
        groups=groups,
        spectra=measurements.spectra,
        sparsity_where_changed=sparsity,
        config=config_differences(plan.sources),
        tokenizers=differences,
        verdicts=findings,
        advice=advise(evidence, findings, plan.recipe),
        seed=plan.recipe.seed,
        device=device,
        threads=measurements.threads,
        seconds=round(measurements.seconds, 3),
        bytes_read=plan.bytes_read,
        peak_memory=0,
    )


def _sparsity_where_changed(sums: Sequence[Relations], sources: int) -> tuple[float | None, ...]:
    """For each source, the unchanged share of those tensors that it changed at all.

    Over all tensors, it would count frozen tensors.
    """
    shares: list[float | None] = []
    for s in range(sources):
        touched = [relations for relations in sums if relations.both[s, s]]
        count = sum(relations.count for relations in touched)
        changed = sum(int(relations.both[s, s]) for relations in touched)
        shares.append(float(f"{1 - changed / count:.6g}") if count else None)
    return tuple(shares)


def _files(model_set: ModelSet, names: Sequence[str]) -> tuple[ModelFiles, ...]:
    return tuple(
        ModelFiles(
            model=name,
            reference=source.label,
            revision=source.revision,
            tensors=len(source.tensors),
            parameters=sum(tensor.size for tensor in source.tensors.values()),
            bytes=sum(tensor.nbytes for tensor in source.tensors.values()),
            dtypes=dtypes,
        )
        for name, source, dtypes in zip(
            names, model_set.sources, stored_dtypes(model_set.sources), strict=True
        )
    )
