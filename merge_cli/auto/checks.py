"""The sections of `merge_method: auto` against the recipe: what is missing, or has no effect."""

from __future__ import annotations

from collections.abc import Iterator

from merge_cli.errors import Problem
from merge_cli.methods.method import Method
from merge_cli.methods.registry import get_method
from merge_cli.recipe.fields import nearest
from merge_cli.recipe.schema import Recipe

SOUP = "uniform soup"  # the step that everything is compared with
SEARCH = "search"  # not a method: weights for task arithmetic, or for a soup
METHODS = ("soup", "task_arithmetic", "fisher", "regmean", SEARCH, "dam")  # in the order of trial


def methods_of(recipe: Recipe) -> tuple[str, ...]:
    """The methods that are tried, in order: those of the recipe, as far as its models allow."""
    chosen = recipe.methods or METHODS
    possible = [name for name in METHODS if recipe.base_model or name != "task_arithmetic"]
    return tuple(name for name in possible if name in chosen)


def automatic_problems(recipe: Recipe, method: Method) -> Iterator[Problem]:
    """What the recipe lacks, or has for a method that tries nothing."""
    if not get_method(recipe.merge_method).automatic:
        message = f"{recipe.merge_method} tries no other methods."
        for key, given in (("budget", recipe.budget), ("methods", recipe.methods)):
            if given:
                yield recipe.problem(key, message, "Use `merge_method: auto`.")
        return
    for key in ("slices", "modules"):
        if getattr(recipe, key):
            yield recipe.problem(key, "auto merges whole models.", "List them under `models:`.")
    if recipe.quantises:
        word = recipe.out_dtype
        message = f"merges are measured in the dtype that they are made in: not in {word}."
        hint = f"Use bfloat16, then merge the result in {word}."
        yield recipe.problem("out_dtype", message, hint)
    for key in ("search", "objective", "coefficients", "output"):
        if getattr(recipe, key):
            yield recipe.problem(key, "has no effect in auto.", "Leave it out.")
    for parameters in (recipe.parameters, *(spec.parameters for spec in recipe.models)):
        for given_parameter in parameters.values():
            message = "auto chooses the method and its numbers by itself."
            yield recipe.problem(given_parameter.key, message, "Leave it out.")
    for i, name in enumerate(recipe.methods):
        if name not in METHODS:
            message = f"'{name}' is no method that auto tries (item {i + 1})."
            yield recipe.problem("methods", message, nearest(name, METHODS))
        elif name == "task_arithmetic" and recipe.base_model is None:
            message = "task_arithmetic adds changes to a base model, and the recipe names none."
            yield recipe.problem("methods", message, "Add `base_model:`.")
    yield from _model_problems(recipe)


def _model_problems(recipe: Recipe) -> Iterator[Problem]:
    seen = set()
    for spec in recipe.models:
        if spec.model in seen:
            message = f"'{spec.model}' is listed twice."
            yield recipe.problem(spec.key, message, "List it once, with all its data.")
        seen.add(spec.model)
        if spec.model == recipe.base_model:
            message = "is the base model, which auto tries anyway."
            yield recipe.problem(spec.key, message, "List it as `base_model` alone.")
        elif spec.data is None:
            message = "has no `data:`, and auto measures merges on data of every model."
            hint = "Give it text that it is good at: `data: FILE`."
            yield recipe.problem(spec.key, message, hint)
        elif spec.data.held_out:
            message = "has no effect in auto, which divides the rows itself."
            yield recipe.problem(f"{spec.key}.data.held_out", message, "Leave it out.")
        elif spec.data.part != "all":
            message = "auto divides all rows itself."
            yield recipe.problem(f"{spec.key}.data.part", message, "Leave it out.")
