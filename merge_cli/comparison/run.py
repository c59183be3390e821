"""Comparing recipes: merge each, evaluate base, parents and merges on the same data, write it down.

    recipes ─▶ plans ─▶ baselines ─▶ merges, each once ─▶ evaluations, each once ─▶ Comparison

Whatever is finished is kept in the folder (merges) and in the cache (evaluations): the same command
goes on where it was stopped, and a second recipe costs only itself.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from merge_cli.checkpoint.source import Source, fetch_weights, open_source
from merge_cli.comparison.baselines import baseline_recipes
from merge_cli.comparison.cost import Ledger, MergeCost, run_merge
from merge_cli.comparison.result import Comparison, Entrant, Role
from merge_cli.engine.device import choose_device
from merge_cli.engine.journal import work_key
from merge_cli.engine.plan import Plan
from merge_cli.engine.planner import load_recipe, make_plan
from merge_cli.errors import Interrupted, MismatchError, Problem, UsageError
from merge_cli.evaluation.run import Step, evaluate_source
from merge_cli.evaluation.spec import EvalSpec
from merge_cli.evaluation.task import file_digest
from merge_cli.recipe.keys import nearest
from merge_cli.recipe.reference import ModelRef

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
        UsageError: two recipes are the same, or share no source.
        Interrupted: by Ctrl-C; the same call goes on.
    """
    folder = Path(out)
    plans = [make_plan(load_recipe(path)) for path in recipes]
    base, sources = _family(plans)
    (folder / "recipes").mkdir(parents=True, exist_ok=True)
    merges, notes = _merges(recipes, plans, base, sources, folder, spec.device)
    names = _names([*([base] if base else []), *sources])
    known = ["base", *names.values(), *(merge.name for merge in merges)]
    for reference in references:
        if reference not in known:
            what = f"'{reference}' takes no part in the comparison."
            raise UsageError(what, hint=nearest(reference, known))
    experts, missing = _experts(spec, [names[source.label] for source in sources])
    ledger = Ledger(folder / "costs.jsonl")
    entrants = []
    try:
        for merge in merges:
            if not merge.out.exists():
                show(Step(merge.name, "merging", 0, 0))
                run_merge(merge.file, merge.out, options, ledger)
        for source in ([base] if base else []) + sources:
            fetch_weights(source, source.header_bytes)
            role: Role = "base" if source is base else "source"
            entrants.append(_entrant(names[source.label], role, source, spec, show))
        for merge in merges:
            opened = open_source(ModelRef(str(merge.out.absolute())), Path.cwd())
            cost = ledger.cost(merge.out.name, merge.out)
            entrants.append(_entrant(merge.name, merge.role, opened, spec, show, merge, cost))
    except (KeyboardInterrupt, Interrupted):
        raise Interrupted("stopped", where=str(folder), hint=GOES_ON) from None
    return Comparison(tuple(entrants), experts, (*notes, *missing))


def _entrant(
    name: str, role: Role, source: Source, spec: EvalSpec, show: Callable[[Step], None],
    merge: _Merge | None = None, cost: MergeCost | None = None,
) -> Entrant:  # fmt: skip
    def renamed(step: Step) -> None:
        show(Step(name, step.task, step.done, step.total))

    found = evaluate_source(source, spec, renamed)
    method = merge.plan.recipe.merge_method if merge else ""
    place = os.path.relpath(source.root) if source.hub is None else source.label
    return Entrant(name, role, place, found, method, merge.text if merge else "", cost)


def _family(plans: Sequence[Plan]) -> tuple[Source | None, list[Source]]:
    """The one base, and every source of any recipe, each once, in the recipes' order."""
    bases = {p.sources[p.base].root.resolve(): p.sources[p.base] for p in plans
             if p.base is not None}  # fmt: skip
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


def _merges(
    recipes: Sequence[str | Path], plans: Sequence[Plan], base: Source | None,
    sources: Sequence[Source], folder: Path, device: str,
) -> tuple[list[_Merge], list[str]]:  # fmt: skip
    """Baselines first, then the recipes; a baseline that a recipe is already is that recipe."""
    kind = choose_device(device).kind
    found: dict[str, _Merge] = {}
    notes: list[str] = []

    def add(name: str, role: Role, file: Path, plan: Plan) -> None:
        key = _work(plan, kind)
        if key in found:
            notes.append(f"{name} is the same merge as {found[key].name}")
            return
        target = folder / "models" / f"{_slug(name)}-{key[:10]}"
        text = file.read_text(encoding="utf-8")
        found[key] = _Merge(name, role, file, text, plan, target)

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
    labels = _recipe_names([Path(path) for path in recipes], plans)
    for path, name, plan in zip(recipes, labels, plans, strict=True):
        add(name, "recipe", Path(path), plan)
        fewer = len(sources) - len({plan.sources[i].root.resolve() for i in plan.operands})
        if fewer > 0:
            notes.append(f"{name} merges {fewer} of the sources fewer")
    if base is None:
        notes.append("without a base there is no task arithmetic and nothing to normalise by")
    return list(found.values()), notes


def _work(plan: Plan, device: str) -> str:
    """A digest of everything that a merge's bytes depend on, and its data, where it learns."""
    key = work_key(plan, device, True)
    if plan.recipe.searches:
        from merge_cli.evolve.run import search_digest

        return hashlib.sha256(f"{key} {search_digest(plan, device)}".encode()).hexdigest()
    if not plan.learns:
        return key
    recipe = plan.recipe
    state = hashlib.sha256(f"{key} {recipe.training!r}".encode())
    for spec in recipe.source_specs:
        state.update(repr(spec.data).encode())
        for file in (*spec.data.files, *spec.data.held_out) if spec.data else ():
            path = recipe.folder / Path(file).expanduser()
            state.update(file_digest(path).encode() if path.is_file() else b"missing")
    return state.hexdigest()


def _recipe_names(files: Sequence[Path], plans: Sequence[Plan]) -> list[str]:
    """Each recipe's own name, or its file's; with as much of its path as tells it apart."""
    names = [plan.recipe.name or file.stem for file, plan in zip(files, plans, strict=True)]
    for parts in (2, 99):
        names = [
            name if names.count(name) == 1 else "/".join(file.with_suffix("").parts[-parts:])
            for name, file in zip(names, files, strict=True)
        ]
    return names


def _place(source: Source) -> str:
    """How a recipe in another folder names it."""
    if source.hub is None:
        return str(source.root.resolve())
    return f"{source.hub.repo_id}@{source.hub.commit}"


def _names(sources: Sequence[Source]) -> dict[str, str]:
    """The last part of each model's name; whole where that would not tell them apart."""
    short = {source.label: source.label.rstrip("/").rpartition("/")[2] for source in sources}
    unique = len(set(short.values())) == len(short)
    return short if unique else {label: label for label in short}


def _experts(spec: EvalSpec, names: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Each task's own source: as it says, or the one of its name."""
    experts, notes = {}, []
    for task in spec.tasks:
        wanted = task.expert or task.name
        if wanted in names:
            experts[task.name] = wanted
        elif task.expert:
            known = ", ".join(names)
            problem = Problem(f"'{task.expert}' is none of the sources ({known})", task.name)
            raise MismatchError([problem], "a task names an expert that takes no part")
        else:
            notes.append(f"no source is called '{task.name}': {task.name} is not normalised "
                         "(say which by `expert`)")  # fmt: skip
    return experts, notes


def _slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-")
