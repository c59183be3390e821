"""`training:`, `coefficients:` and the sources' `data:` against the method: what is wrong."""

from __future__ import annotations

from collections.abc import Iterator

from merge_cli.errors import Problem
from merge_cli.methods.method import Method
from merge_cli.methods.registry import get_method
from merge_cli.recipe.reference import local_file
from merge_cli.recipe.schema import Recipe


def learning_problems(recipe: Recipe, method: Method) -> Iterator[Problem]:
    """What the sections on learning lack, or want from a method that does not learn."""
    if get_method(recipe.merge_method).automatic:
        return  # `auto` checks what it passes on
    if not method.learns:
        message = f"{recipe.merge_method} learns nothing."
        if recipe.training is not None:
            yield recipe.problem("training", message, "Use `merge_method: dam`.")
        if recipe.coefficients and "coefficients" not in method.supplied:
            message = f"{recipe.merge_method} takes no file of coefficients."
            yield recipe.problem("coefficients", message, "Use `merge_method: dam`.")
        for spec in recipe.source_specs:
            if spec.data is not None and method.plain and not recipe.searches:
                message = f"{recipe.merge_method} learns nothing from data."
                yield recipe.problem(f"{spec.key}.data", message, "Use `merge_method: dam`.")
        return
    for key in ("slices", "modules"):
        if getattr(recipe, key):
            yield recipe.problem(key, "dam merges whole models.", "List them under `models:`.")
    if recipe.coefficients:
        if local_file(recipe.coefficients, recipe.folder) is None:
            message = f"no such file: {recipe.coefficients}"
            yield recipe.problem("coefficients", message)
    elif not any(spec.data for spec in recipe.source_specs):
        message = "no model has `data:`, so that there is nothing to learn from."
        hint = "Give a model the data that it is good at, or name a `coefficients:` file."
        yield recipe.problem("models", message, hint)
    if not recipe.coefficients:
        yield from _twice(recipe)


def learning_warnings(recipe: Recipe, method: Method) -> Iterator[str]:
    """Data beside coefficients that are given."""
    if not method.learns or not recipe.coefficients:
        return
    for spec in recipe.source_specs:
        if spec.data is not None:
            where = recipe.position_of(f"{spec.key}.data")
            yield f"{where}: has no effect: the coefficients are given."


def _twice(recipe: Recipe) -> Iterator[Problem]:
    """Sources that are listed again: a model has one set of coefficients, and one teacher."""
    seen = set()
    for spec in recipe.models:
        if spec.model in seen:
            message = f"'{spec.model}' is listed twice: its coefficients cannot be told apart."
            yield recipe.problem(spec.key, message, "List it once, with all its data.")
        seen.add(spec.model)
