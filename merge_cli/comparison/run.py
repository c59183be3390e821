"""Comparing recipes: merge each, then evaluate base, sources and merges on the same data.

    recipes ─▶ plans ─▶ baselines ─▶ merges, each once ─▶ evaluations, each once ─▶ Comparison

Finished merges stay in the folder, and evaluations in the cache: the same command resumes, and a
further recipe only costs its own merge and evaluation.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from merge_cli.checkpoint.fingerprint import auxiliary_fingerprint
from merge_cli.comparison.cost import COSTS, CostLog, MergeCost, run_merge
from merge_cli.comparison.entries import SOUP, EntryNames, baseline_recipes
from merge_cli.comparison.files import recipe_file, result_files, slug
from merge_cli.comparison.result import Comparison, ModelEntry, Role
from merge_cli.engine.device import device_of
from merge_cli.engine.journal import work_key
from merge_cli.errors import Interrupted, MismatchError, Problem, UsageError
from merge_cli.evaluation.result import Evaluation
from merge_cli.evaluation.run import evaluate_source
from merge_cli.evaluation.spec import EvalSpec
from merge_cli.options import MergeOptions, OnProgress, Progress, ignore_progress
from merge_cli.planning.plan import Plan
from merge_cli.planning.planner import load_recipe, make_plan
from merge_cli.planning.preparation import preparations_of
from merge_cli.planning.stages import plan_recipe
from merge_cli.recipe.fields import nearest
from merge_cli.recipe.named_files import named_files
from merge_cli.recipe.reference import ModelRef
from merge_cli.sources.opening import open_source
from merge_cli.sources.result_files import refuse_replacing
from merge_cli.sources.source import Source, fetch_weights
from merge_cli.system.paths import require_text
from merge_cli.system.raw_io import write_error

RESUMES = "The same command resumes: finished merges and evaluations are kept."


@dataclass(frozen=True)
class _Merge:
    """One merge of the comparison.

    Attributes:
        out: its folder.
        made: the folder that the recipe makes: the same, or that of the whole sweep.
    """

    name: str
    role: Role
    file: Path
    text: str
    plan: Plan
    out: Path
    made: Path


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
    planned = [_planned(path) for path in recipes]
    base, sources = _family([p for plan in planned for p in plan.variants.values() or [plan]])
    names = EntryNames(base, sources)
    read = [*map(Path, recipes), *(file for plan in planned for file in named_files(plan.recipe))]
    models_read = [*(source for plan in planned for source in plan.sources), *spec.models()]
    refuse_replacing(result_files(folder), models_read, [*read, *spec.files()])
    where = MergeOptions(device=spec.device, ray=ray)
    options = [*options, *(["--ray", ray] if ray else [])]
    try:
        (folder / "recipes").mkdir(parents=True, exist_ok=True)
        merges = _merges(recipes, planned, base, sources, names, folder, device_of(where).kind)
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
    notes = (*merges.notes, *missing)
    return Comparison(tuple(entries), experts, merges.soup, merges.same, notes)


def _planned(path: str | Path) -> Plan:
    """The plan of a recipe of one document, or of a sweep."""
    recipe = load_recipe(path)
    return plan_recipe(recipe) if recipe.sweep else make_plan(recipe)


@dataclass(frozen=True)
class _Model:
    """A model to evaluate; of a merge also how it was made."""

    name: str
    role: Role
    source: Source
    merge: _Merge | None = None
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


def _family(plans: Sequence[Plan]) -> tuple[Source | None, list[Source]]:
    """The base of all recipes, and every source of any recipe, each once, in order."""
    bases = {
        p.sources[p.base].root.resolve(): p.sources[p.base] for p in plans if p.base is not None
    }
    if len(bases) > 1:
        listed = ", ".join(source.label for source in bases.values())
        hint = "Compare recipes over one base."
        raise UsageError(f"the recipes have different bases ({listed})", hint=hint)
    sources: dict[Path, Source] = {}
    for plan in plans:
        for i in plan.operands:
            sources.setdefault(plan.sources[i].root.resolve(), plan.sources[i])
    others = [source for root, source in sources.items() if root not in bases]
    return next(iter(bases.values()), None), others


@dataclass
class _Merges:
    """The merges of a comparison, baselines first.

    Attributes:
        soup: the name of the uniform soup: a baseline's, or a recipe's that is the same merge.
        same: another name of a merge -> the name it has here.
    """

    merges: list[_Merge]
    soup: str | None
    same: dict[str, str]
    notes: list[str]


def _merges(
    recipes: Sequence[str | Path],
    plans: Sequence[Plan],
    base: Source | None,
    sources: Sequence[Source],
    names: EntryNames,
    folder: Path,
    kind: str,
) -> _Merges:
    """Recipes and baselines, each merge once: a baseline may be the same merge as a recipe.

    Args:
        kind: of the device that merges.
    """
    by_key: dict[str, _Merge] = {}
    same: dict[str, str] = {}
    notes: list[str] = []
    variants: dict[str, str] = {}  # a name in the comparison -> in its sweep

    def add(name: str, role: Role, file: Path, plan: Plan, sweep: Path | None = None) -> None:
        key = _work(plan, kind)
        if key in by_key:
            same[name] = by_key[key].name
            notes.append(f"{name} is the same merge as {by_key[key].name}")
            return
        made = sweep or folder / "models" / f"{slug(name)}-{key[:10]}"
        target = made / variants[name] if sweep else made
        text = file.read_text(encoding="utf-8")
        by_key[key] = _Merge(name, role, file, text, plan, target, made)

    for path, plan in zip(recipes, plans, strict=True):
        file = Path(path)
        if plan.variants:
            sweep = folder / "models" / f"{slug(file.stem)}-{work_key(plan, kind, True)[:10]}"
            for variant, decided in plan.variants.items():
                name = names.of_variant(file, variant)
                variants[name] = variant
                add(name, "recipe", file, decided, sweep)
            notes.append(f"{file.stem} is a sweep: each variant's time is that of all its variants")
            continue
        name = names.of_recipe(file, plan.recipe.name)
        add(name, "recipe", file, plan)
        fewer = len(sources) - len({plan.sources[i].root.resolve() for i in plan.operands})
        if fewer > 0:
            notes.append(f"{name} leaves out {fewer} of the sources")
    dtype = plans[0].recipe.output_dtype
    references = [_reference(source) for source in sources]
    for name, text in baseline_recipes(
        _reference(base) if base else None, references, dtype
    ).items():
        file = recipe_file(folder, name)
        file.write_text(text, encoding="utf-8")
        try:
            plan = make_plan(load_recipe(file))
        except MismatchError as error:  # stacked layers may have no average
            notes.append(f"no {name}: {error.summary}".partition("\n")[0])
            continue
        add(name, "baseline", file, plan)
    if base is None:
        notes.append("without a base there is no task arithmetic and nothing to normalise by")
    ordered = sorted(by_key.values(), key=lambda merge: merge.role != "baseline")
    listed = {merge.name for merge in ordered}
    soup = SOUP if SOUP in listed else same.get(SOUP)
    return _Merges(ordered, soup, same, notes)


def _work(plan: Plan, device: str) -> str:
    """The fingerprint of everything that a merged model depends on, config and tokenizer included.

    Where something is prepared first, also of what that is made from.
    """
    state = hashlib.sha256(work_key(plan, device, True).encode())
    state.update(json.dumps(dict(plan.config), sort_keys=True).encode())
    for index in {plan.config_index, plan.tokenizer_index}:
        content = auxiliary_fingerprint(plan.sources[index].root)
        state.update(f"{index == plan.config_index} {content}".encode())
    for preparation in preparations_of(plan):
        state.update(preparation.identity(plan, device))
    return state.hexdigest()


def _reference(source: Source) -> str:
    """A source's name in a recipe in any folder."""
    if source.remote is not None:
        return source.label
    if source.hub is None:
        return str((source.root / source.file).resolve())
    return f"{source.hub.repo_id}@{source.hub.commit}"


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
