"""`statistics:` and the sources' `data:` against the method: what is missing, or has no effect."""

from __future__ import annotations

from collections.abc import Iterator

from merge_cli.errors import Problem
from merge_cli.methods.method import Method
from merge_cli.methods.registry import get_method
from merge_cli.recipe.reference import local_folder
from merge_cli.recipe.schema import Recipe
from merge_cli.recipe.statistics import unused_options


def calibration_problems(recipe: Recipe, method: Method) -> Iterator[Problem]:
    """What the section lacks, or wants from a method that looks at nothing."""
    name, folder = recipe.merge_method, recipe.statistics_folder
    if get_method(name).automatic:
        return  # `auto` checks what it passes on
    if not method.gathers:
        learns = method.learns and not recipe.coefficients
        if recipe.statistics is not None and not (recipe.searches or learns):
            message = f"{name} looks at no examples."
            yield recipe.problem("statistics", message, "Use `merge_method: regmean` or fisher.")
        return
    for key in ("slices", "modules"):
        if getattr(recipe, key):
            message = f"{name} runs whole models on their data."
            yield recipe.problem(key, message, "List them under `models:`.")
    if folder is not None:
        path = local_folder(folder, recipe.folder)
        if path is None or not path.is_dir():
            yield recipe.problem("statistics", f"no such folder: {folder}")
        return
    if recipe.models:
        for spec in recipe.models:
            if spec.data is None:
                message = f"has no `data:`, and {name} looks at examples of every model."
                hint = "Give it text that it is good at: `data: FILE`."
                yield recipe.problem(spec.key, message, hint)
    for option in unused_options(method.gathers):
        if f"statistics.{option}" in recipe.positions:
            message = f"has no effect in {name}."
            yield recipe.problem(f"statistics.{option}", message, "Leave it out.")


def calibration_warnings(recipe: Recipe, method: Method) -> Iterator[str]:
    """Data that would be held out for measuring, or looked at: neither happens here."""
    if not method.gathers:
        return
    if recipe.statistics_folder is not None:
        for spec in recipe.models:
            if spec.data is not None:
                where = recipe.position_of(f"{spec.key}.data")
                yield f"{where}: has no effect: the statistics are given."
        return
    for spec in recipe.models:
        if spec.data is not None and spec.data.held_out:
            where = recipe.position_of(f"{spec.key}.data.held_out")
            yield f"{where}: has no effect: {recipe.merge_method} measures nothing."
