"""Every model of a recipe, opened once, however it is spelled."""

from __future__ import annotations

from pathlib import Path

from merge_cli.checkpoint.quantised import advice
from merge_cli.checkpoint.source import Source, open_source
from merge_cli.errors import MergeCliError, MismatchError, Problem, SourceError
from merge_cli.recipe.reference import ModelRef, local_folder
from merge_cli.recipe.schema import Recipe


def one_spelling(recipe: Recipe) -> Recipe:
    """`base` and `./base` are one model: named as the recipe names it first."""
    first: dict[Path, ModelRef] = {}
    spelling: dict[ModelRef, ModelRef] = {}
    named = [recipe.base_model, *(spec.model for spec in recipe.source_specs)]
    for model in named:
        if model is not None:
            place = local_folder(model.path, recipe.folder)
            known = place is not None and not model.lora
            spelling[model] = first.setdefault(place.resolve(), model) if place and known else model
    return recipe.with_models(spelling)


def open_all(recipe: Recipe) -> tuple[Recipe, list[Source]]:
    """Open every model, the base first.

    Returns:
        the recipe with one spelling for each model, and the sources, each once.
    """
    references = dict.fromkeys(spec.model for spec in recipe.source_specs)
    if recipe.base_model is not None:
        references = {recipe.base_model: None, **references}
    opened: dict[ModelRef, Source] = {}
    first: dict[tuple[Path, ...], ModelRef] = {}
    spelling: dict[ModelRef, ModelRef] = {}
    errors: list[MergeCliError] = []
    for reference in references:
        try:
            source = open_source(reference, recipe.folder)
        except SourceError as error:
            errors.append(error)
            continue
        # `base` and `./base`, a branch and its commit: one model, whose spelling decides nothing.
        spelling[reference] = first.setdefault(source.place, reference)
        opened.setdefault(spelling[reference], source)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        problems = [Problem(str(error)) for error in errors]
        raise MismatchError(problems, f"{len(errors)} models cannot be opened")
    for source in opened.values():
        refused = advice(source.config)
        if refused is not None:
            method, hint = refused
            what = f"its weights are quantised ({method})"
            raise SourceError(what, model=source.label, hint=hint)
    return recipe.with_models(spelling), list(opened.values())
