"""Comparing recipes: merge each, evaluate base, parents and merges on the same data, write it down.

    recipes ─▶ plans ─▶ baselines ─▶ merges, each once ─▶ evaluations, each once ─▶ Comparison

Whatever is finished is kept in the folder (merges) and in the cache (evaluations): the same command
goes on where it was stopped, and a second recipe costs only itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from merge_cli.comparison.cost import CostLog, MergeCost, run_merge
from merge_cli.comparison.entries import SOUP, EntryNames, baseline_recipes
from merge_cli.comparison.result import Comparison, ModelEntry, Role
from merge_cli.engine.device import choose_device
from merge_cli.engine.journal import work_key
from merge_cli.errors import Interrupted, MismatchError, Problem, UsageError
from merge_cli.evaluation.fingerprints import auxiliary_fingerprint
from merge_cli.evaluation.run import Step, evaluate_source
from merge_cli.evaluation.spec import EvalSpec
from merge_cli.planning.plan import Plan
from merge_cli.planning.planner import load_recipe, make_plan
from merge_cli.planning.preparation import preparations_of
from merge_cli.recipe.fields import nearest
from merge_cli.recipe.reference import ModelRef
from merge_cli.sources.source import Source, fetch_weights, open_source
from merge_cli.system.raw_io import write_error

GOES_ON = "The same command goes on: finished merges and evaluations are kept."


@dataclass(frozen=True)
class _Merge:
    """One merge that takes part."""

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
    show: Callable[[Step], None] = lambda step: None,
) -> Comparison:
    """Merge, evaluate, compare.

    Args:
        recipes: files.
        spec: what to evaluate, as `merge_cli.evaluate` takes it.
        out: the folder for merges and results; what it holds already is not made again.
        references: models that gates compare with: they must take part.
        options: of `merge-cli run`, for every merge (`--device`, `--threads`, ...).
        show: told of progress.

    Raises:
        RecipeError, SourceError, MismatchError: of any recipe, before anything is merged.
        UsageError: recipes over different bases; a reference that takes no part.
        ResourceError: the folder cannot be written.
        Interrupted: by Ctrl-C; the same call goes on.
    """
    folder = Path(out)
    plans = [make_plan(load_recipe(path)) for path in recipes]
    base, sources = _family(plans)
    names = EntryNames(base, sources)
    try:
        (folder / "recipes").mkdir(parents=True, exist_ok=True)
        merges = _merges(recipes, plans, base, sources, names, folder, spec.device)
        ledger = CostLog(folder / "costs.jsonl")
    except OSError as error:
        raise write_error(error, folder) from error
    known = [*names.of.values(), *(merge.name for merge in merges.found), *merges.same]
    known += ["base"] if base is not None else []
    for reference in references:
        if reference not in known:
            message = f"'{reference}' takes no part in the comparison."
            raise UsageError(message, hint=nearest(reference, known))
    experts, missing = _experts(spec, [names.of[source.root.resolve()] for source in sources])
    entrants = []
    try:
        for merge in merges.found:
            if not merge.out.exists():
                show(Step(merge.name, "merging", 0, 0))
                run_merge(merge.file, merge.out, options, ledger)
        for source in ([base] if base else []) + sources:
            fetch_weights(source, source.header_bytes)
            role: Role = "base" if source is base else "source"
            name = names.of[source.root.resolve()]
            entrants.append(_entrant(name, role, source, spec, show))
        for merge in merges.found:
            opened = open_source(ModelRef(str(merge.out.absolute())), Path.cwd())
            cost = ledger.cost(merge.out.name, merge.out)
            entrants.append(_entrant(merge.name, merge.role, opened, spec, show, merge, cost))
    except (KeyboardInterrupt, Interrupted):
        raise Interrupted("stopped", where=str(folder), hint=GOES_ON) from None
    notes = (*merges.notes, *missing)
    return Comparison(tuple(entrants), experts, merges.soup, merges.same, notes)


def _entrant(
    name: str,
    role: Role,
    source: Source,
    spec: EvalSpec,
    show: Callable[[Step], None],
    merge: _Merge | None = None,
    cost: MergeCost | None = None,
) -> ModelEntry:
    def renamed(step: Step) -> None:
        show(Step(name, step.task, step.done, step.total))

    result = evaluate_source(source, spec, renamed)
    method = merge.plan.recipe.merge_method if merge else ""
    place = os.path.relpath(source.root) if source.hub is None else source.label
    return ModelEntry(name, role, place, result, method, merge.text if merge else "", cost)


def _family(plans: Sequence[Plan]) -> tuple[Source | None, list[Source]]:
    """The one base, and every source of any recipe, each once, in the recipes' order."""
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
    """The merges that take part, baselines first.

    Attributes:
        soup: the name of the uniform soup: a baseline's, or a recipe's that is the same merge.
        same: a name that takes no part itself -> the merge that it is.
    """

    found: list[_Merge]
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
    """Recipes and baselines, each merge once. A baseline that is also a recipe is that recipe."""
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
            notes.append(f"{name} merges {fewer} of the sources fewer")
    dtype = plans[0].recipe.output_dtype
    places = [_place(source) for source in sources]
    for name, text in baseline_recipes(_place(base) if base else None, places, dtype).items():
        file = folder / "recipes" / f"{_slug(name)}.yaml"
        file.write_text(text, encoding="utf-8")
        try:
            plan = make_plan(load_recipe(file))
        except MismatchError as error:  # of stacked layers there may be no average
            notes.append(f"no {name}: {error.summary}".partition("\n")[0])
            continue
        add(name, "baseline", file, plan)
    if base is None:
        notes.append("without a base there is no task arithmetic and nothing to normalise by")
    result = sorted(by_key.values(), key=lambda merge: merge.role != "baseline")
    here = {merge.name for merge in result}
    soup = SOUP if SOUP in here else same.get(SOUP)
    return _Merges(result, soup, same, notes)


def _work(plan: Plan, device: str) -> str:
    """A digest of everything that a merged model depends on, its config and tokenizer included.

    Where something is prepared first, also of what that is made from.
    """
    state = hashlib.sha256(work_key(plan, device, True).encode())
    state.update(json.dumps(dict(plan.config), sort_keys=True).encode())
    for donor in {plan.donor, plan.tokenizer_donor}:
        state.update(
            f"{donor == plan.donor} {auxiliary_fingerprint(plan.sources[donor].root)}".encode()
        )
    for preparation in preparations_of(plan):
        state.update(preparation.identity(plan, device))
    return state.hexdigest()


def _place(source: Source) -> str:
    """How a recipe in another folder names it."""
    if source.hub is None:
        return str(source.root.resolve())
    return f"{source.hub.repo_id}@{source.hub.commit}"


def _experts(spec: EvalSpec, names: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Each task's own source: as it says, or the one of its name."""
    experts, notes = {}, []
    for task in spec.tasks:
        requested = task.expert or task.name
        if requested in names:
            experts[task.name] = requested
        elif task.expert:
            known = ", ".join(names)
            problem = Problem(f"'{task.expert}' is none of the sources ({known})", task.name)
            raise MismatchError([problem], "a task names an expert that takes no part")
        else:
            notes.append(
                f"no source is called '{task.name}': {task.name} is not normalised "
                "(say which by `expert`)"
            )
    return experts, notes


def _slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-")
