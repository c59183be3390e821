"""Comparing recipes: merge each, then evaluate base, sources and merges on the same data.

    recipes ─▶ plans ─▶ baselines ─▶ merges, each once ─▶ evaluations, each once ─▶ Comparison

Finished merges stay in the folder, and evaluations in the cache: the same command resumes, and a
further recipe only costs its own merge and evaluation.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from merge_cli.comparison.cost import COSTS, CostLog, MergeCost, run_merge
from merge_cli.comparison.entries import EntryNames
from merge_cli.comparison.files import result_files
from merge_cli.comparison.merges import Merge, all_merges, family_of, plan_of
from merge_cli.comparison.result import Comparison, ModelEntry, Role
from merge_cli.engine.device import device_of
from merge_cli.errors import Interrupted, MismatchError, Problem, UsageError
from merge_cli.evaluation.quality_check import overlap_notes
from merge_cli.evaluation.result import Evaluation
from merge_cli.evaluation.run import evaluate_source
from merge_cli.evaluation.spec import EvalSpec
from merge_cli.options import MergeOptions, OnProgress, Progress, ignore_progress
from merge_cli.recipe.fields import nearest
from merge_cli.recipe.named_files import named_files
from merge_cli.recipe.reference import ModelRef
from merge_cli.sources.opening import open_source
from merge_cli.sources.result_files import refuse_replacing
from merge_cli.sources.source import Source, fetch_weights
from merge_cli.system.notices import say_once
from merge_cli.system.paths import require_text
from merge_cli.system.raw_io import write_error

RESUMES = "The same command resumes: finished merges and evaluations are kept."


def compare(
    recipes: Sequence[str | Path],
    spec: EvalSpec,
    out: str | Path,
    *,
    references: Collection[str] = (),
    options: Sequence[str] = (),
    ray: str | None = None,
    on_progress: OnProgress = ignore_progress,
) -> Comparison:
    """Merge recipes, evaluate all models, and compare them.

    Args:
        recipes: files.
        spec: what to evaluate, as `merge_cli.evaluate` takes it.
        out: the folder for merges and results; finished merges in it are used.
        references: models that gates compare with; they must be in the comparison.
        options: of `merge-cli run`, for every merge (`--device`, `--threads`, ...).
        ray: the address of a Ray cluster, whose nodes share every merge, and evaluate the models.
        on_progress: called with progress.

    Raises:
        RecipeError, SourceError, MismatchError: of any recipe, before anything is merged.
        UsageError: recipes with different bases; a reference that is not in the comparison.
        ResourceError: the folder cannot be written.
        Interrupted: by Ctrl-C; the same call resumes.
    """
    folder = Path(out)
    require_text(folder)
    plans = [plan_of(path) for path in recipes]
    base, sources = family_of([p for plan in plans for p in plan.variants.values() or [plan]])
    names = EntryNames(base, sources)
    read = [*map(Path, recipes), *(file for plan in plans for file in named_files(plan.recipe))]
    models_read = [*(source for plan in plans for source in plan.sources), *spec.models()]
    refuse_replacing(result_files(folder), models_read, [*read, *spec.files()])
    where = MergeOptions(device=spec.device, ray=ray)
    options = [*options, *(["--ray", ray] if ray else [])]
    try:
        (folder / "recipes").mkdir(parents=True, exist_ok=True)
        merges = all_merges(recipes, plans, base, sources, names, folder, device_of(where).kind)
        cost_log = CostLog(folder / COSTS)
    except OSError as error:
        raise write_error(error, folder) from error
    names_in_comparison = [
        *names.of.values(),
        *(merge.name for merge in merges.merges),
        *merges.same,
    ]
    names_in_comparison += ["base"] if base is not None else []
    for reference in references:
        if reference not in names_in_comparison:
            message = f"'{reference}' is not in the comparison."
            raise UsageError(message, hint=nearest(reference, names_in_comparison))
    flattered = [
        f"{Path(file).stem}: {note}"
        for file, plan in zip(recipes, plans, strict=True)
        for note in overlap_notes(plan, spec)
    ]
    for note in flattered:
        say_once(note)  # at once, and in the results
    experts, missing = _experts(spec, [names.of[source.root.resolve()] for source in sources])
    try:
        for merge in merges.merges:
            if not merge.made.exists():
                on_progress(Progress("merging", 0, 0, model=merge.name))
                run_merge(merge.file, merge.made, options, cost_log)
        models: list[_Model] = []
        for source in ([base] if base else []) + sources:
            fetch_weights(source, source.header_bytes)
            role: Role = "base" if source is base else "source"
            models.append(_Model(names.of[source.root.resolve()], role, source))
        for merge in merges.merges:
            opened = open_source(ModelRef(str(merge.out.absolute())), Path.cwd())
            cost = cost_log.cost(merge.made.name, merge.out)
            models.append(_Model(merge.name, merge.role, opened, merge, cost))
        evaluations = _evaluated(models, spec, ray, on_progress)
        entries = [_entry(*pair) for pair in zip(models, evaluations, strict=True)]
    except (KeyboardInterrupt, Interrupted):
        raise Interrupted("stopped", where=str(folder), hint=RESUMES) from None
    notes = (*merges.notes, *missing, *flattered)
    return Comparison(tuple(entries), experts, merges.soup, merges.same, notes)


@dataclass(frozen=True)
class _Model:
    """A model to evaluate; of a merge also how it was made."""

    name: str
    role: Role
    source: Source
    merge: Merge | None = None
    cost: MergeCost | None = None


def _evaluated(
    models: Sequence[_Model], spec: EvalSpec, ray: str | None, on_progress: OnProgress
) -> list[Evaluation]:
    """Every model's evaluation: here, one after the other, or each as a task of a cluster."""
    if ray is None:
        return [
            evaluate_source(model.source, spec, partial(_of_model, on_progress, model.name))
            for model in models
        ]
    from merge_cli.cluster.connection import BESIDE_A_MODEL
    from merge_cli.cluster.tasks import task_cluster

    results: dict[int, Evaluation] = {}
    largest = max(sum(t.nbytes for t in model.source.tensors.values()) for model in models)
    memory = largest + BESIDE_A_MODEL
    with task_cluster(ray, spec.device, spec.threads, memory) as cluster:
        there = spec.changed(device=cluster.kind, threads=cluster.cpus)
        for number, result in cluster.map(evaluate_source, [(m.source, there) for m in models]):
            results[number] = result
            on_progress(Progress("evaluated", len(results), len(models), unit="models"))
    return [results[number] for number in range(len(models))]


def _of_model(on_progress: OnProgress, name: str, progress: Progress) -> None:
    on_progress(replace(progress, model=name))


def _entry(model: _Model, evaluation: Evaluation) -> ModelEntry:
    source, merge = model.source, model.merge
    method = merge.plan.recipe.merge_method if merge else ""
    path = os.path.relpath(source.root) if source.hub is None else source.label
    text = merge.text if merge else ""
    return ModelEntry(model.name, model.role, path, evaluation, method, text, model.cost)


def _experts(spec: EvalSpec, names: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The expert of each task: the source that it names, or the source with its name."""
    experts, notes = {}, []
    for task in spec.tasks:
        expert = task.expert or task.name
        if expert in names:
            experts[task.name] = expert
        elif task.expert:
            listed = ", ".join(names)
            problem = Problem(f"'{task.expert}' is not one of the sources ({listed})", task.name)
            raise MismatchError([problem], "a task names an expert that is not in the comparison")
        else:
            notes.append(
                f"no source is called '{task.name}': {task.name} is not normalised "
                "(name its expert by `expert`)"
            )
    return experts, notes
