"""Comparing recipes: merge each, then evaluate base, sources and merges on the same data.

    recipes ─▶ plans ─▶ baselines ─▶ merges, each once ─▶ evaluations, each once ─▶ Comparison

Finished merges stay in the folder, and evaluations in the cache: the same command resumes, and a
further recipe only costs its own merge and evaluation.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from merge_cli.checkpoint.fingerprint import auxiliary_fingerprint
from merge_cli.comparison.cost import CostLog, MergeCost, run_merge
from merge_cli.comparison.entries import SOUP, EntryNames, baseline_recipes
from merge_cli.comparison.result import Comparison, ModelEntry, Role
from merge_cli.engine.device import choose_device
from merge_cli.engine.journal import work_key
from merge_cli.errors import Interrupted, MismatchError, Problem, UsageError
from merge_cli.evaluation.run import evaluate_source
from merge_cli.evaluation.spec import EvalSpec
from merge_cli.options import OnProgress, Progress, ignore_progress
from merge_cli.planning.plan import Plan
from merge_cli.planning.planner import load_recipe, make_plan
from merge_cli.planning.preparation import preparations_of
from merge_cli.recipe.fields import nearest
from merge_cli.recipe.reference import ModelRef
from merge_cli.sources.source import Source, fetch_weights, open_source
from merge_cli.system.raw_io import write_error

RESUMES = "The same command resumes: finished merges and evaluations are kept."


@dataclass(frozen=True)
class _Merge:
    """One merge of the comparison."""

    name: str
    role: Role
    file: Path
    text: str
    plan: Plan
    out: Path


def compare(
    recipes: Sequence[str | Path],
    spec: EvalSpec,
    out: str | Path,
    *,
    references: Collection[str] = (),
    options: Sequence[str] = (),
    on_progress: OnProgress = ignore_progress,
) -> Comparison:
    """Merge recipes, evaluate all models, and compare them.

    Args:
        recipes: files.
        spec: what to evaluate, as `merge_cli.evaluate` takes it.
        out: the folder for merges and results; finished merges in it are used.
        references: models that gates compare with; they must be in the comparison.
        options: of `merge-cli run`, for every merge (`--device`, `--threads`, ...).
        on_progress: called with progress.

    Raises:
        RecipeError, SourceError, MismatchError: of any recipe, before anything is merged.
        UsageError: recipes with different bases; a reference that is not in the comparison.
        ResourceError: the folder cannot be written.
        Interrupted: by Ctrl-C; the same call resumes.
    """
    folder = Path(out)
    plans = [make_plan(load_recipe(path)) for path in recipes]
    base, sources = _family(plans)
    names = EntryNames(base, sources)
    try:
        (folder / "recipes").mkdir(parents=True, exist_ok=True)
        merges = _merges(recipes, plans, base, sources, names, folder, spec.device)
        cost_log = CostLog(folder / "costs.jsonl")
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
    entries = []
    try:
        for merge in merges.merges:
            if not merge.out.exists():
                on_progress(Progress("merging", 0, 0, model=merge.name))
                run_merge(merge.file, merge.out, options, cost_log)
        for source in ([base] if base else []) + sources:
            fetch_weights(source, source.header_bytes)
            role: Role = "base" if source is base else "source"
            name = names.of[source.root.resolve()]
            entries.append(_entry(name, role, source, spec, on_progress))
        for merge in merges.merges:
            opened = open_source(ModelRef(str(merge.out.absolute())), Path.cwd())
            cost = cost_log.cost(merge.out.name, merge.out)
            entries.append(_entry(merge.name, merge.role, opened, spec, on_progress, merge, cost))
    except (KeyboardInterrupt, Interrupted):
        raise Interrupted("stopped", where=str(folder), hint=RESUMES) from None
    notes = (*merges.notes, *missing)
    return Comparison(tuple(entries), experts, merges.soup, merges.same, notes)


def _entry(
    name: str,
    role: Role,
    source: Source,
    spec: EvalSpec,
    on_progress: OnProgress,
    merge: _Merge | None = None,
    cost: MergeCost | None = None,
) -> ModelEntry:
    def renamed(progress: Progress) -> None:
        on_progress(replace(progress, model=name))

    evaluation = evaluate_source(source, spec, renamed)
    method = merge.plan.recipe.merge_method if merge else ""
    path = os.path.relpath(source.root) if source.hub is None else source.label
    return ModelEntry(name, role, path, evaluation, method, merge.text if merge else "", cost)


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
    device: str,
) -> _Merges:
    """Recipes and baselines, each merge once: a baseline may be the same merge as a recipe."""
    kind = choose_device(device).kind
    by_key: dict[str, _Merge] = {}
    same: dict[str, str] = {}
    notes: list[str] = []

    def add(name: str, role: Role, file: Path, plan: Plan) -> None:
        key = _work(plan, kind)
        if key in by_key:
            same[name] = by_key[key].name
            notes.append(f"{name} is the same merge as {by_key[key].name}")
            return
        target = folder / "models" / f"{_slug(name)}-{key[:10]}"
        text = file.read_text(encoding="utf-8")
        by_key[key] = _Merge(name, role, file, text, plan, target)

    for path, plan in zip(recipes, plans, strict=True):
        name = names.of_recipe(Path(path), plan.recipe.name)
        add(name, "recipe", Path(path), plan)
        fewer = len(sources) - len({plan.sources[i].root.resolve() for i in plan.operands})
        if fewer > 0:
            notes.append(f"{name} leaves out {fewer} of the sources")
    dtype = plans[0].recipe.output_dtype
    references = [_reference(source) for source in sources]
    for name, text in baseline_recipes(
        _reference(base) if base else None, references, dtype
    ).items():
        file = folder / "recipes" / f"{_slug(name)}.yaml"
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
    if source.hub is None:
        return str(source.root.resolve())
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


def _slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-")
