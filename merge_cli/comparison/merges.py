"""What a comparison merges: recipes and baselines, each merge once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from merge_cli.checkpoint.fingerprint import auxiliary_fingerprint
from merge_cli.comparison.entries import SOUP, EntryNames, baseline_recipes
from merge_cli.comparison.files import recipe_file, slug
from merge_cli.comparison.result import Role
from merge_cli.engine.journal import work_key
from merge_cli.errors import MismatchError, UsageError
from merge_cli.planning.plan import Plan
from merge_cli.planning.planner import load_recipe, make_plan
from merge_cli.planning.preparation import preparations_of
from merge_cli.planning.stages import plan_recipe
from merge_cli.sources.source import Source


@dataclass(frozen=True)
class Merge:
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


@dataclass
class Merges:
    """The merges of a comparison, baselines first.

    Attributes:
        soup: the name of the uniform soup: a baseline's, or a recipe's that is the same merge.
        same: another name of a merge -> the name it has here.
    """

    merges: list[Merge]
    soup: str | None
    same: dict[str, str]
    notes: list[str]


def all_merges(
    recipes: Sequence[str | Path],
    plans: Sequence[Plan],
    base: Source | None,
    sources: Sequence[Source],
    names: EntryNames,
    folder: Path,
    kind: str,
) -> Merges:
    """Recipes and baselines, each merge once: a baseline may be the same merge as a recipe.

    Args:
        kind: of the device that merges.
    """
    by_key: dict[str, Merge] = {}
    same: dict[str, str] = {}
    notes: list[str] = []
    variants: dict[str, str] = {}  # a name in the comparison -> in its sweep

    def add(name: str, role: Role, file: Path, plan: Plan, sweep: Path | None = None) -> None:
        key = merge_key(plan, kind)
        if key in by_key:
            same[name] = by_key[key].name
            notes.append(f"{name} is the same merge as {by_key[key].name}")
            return
        made = sweep or folder / "models" / f"{slug(name)}-{key[:10]}"
        target = made / variants[name] if sweep else made
        text = file.read_text(encoding="utf-8")
        by_key[key] = Merge(name, role, file, text, plan, target, made)

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
    return Merges(ordered, soup, same, notes)


def plan_of(path: str | Path) -> Plan:
    """The plan of a recipe of one document, or of a sweep."""
    recipe = load_recipe(path)
    return plan_recipe(recipe) if recipe.sweep else make_plan(recipe)


def family_of(plans: Sequence[Plan]) -> tuple[Source | None, list[Source]]:
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


def merge_key(plan: Plan, device: str) -> str:
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
