"""The files that a recipe is read from and names: what no result of it may replace."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from merge_cli.recipe.reference import local_file, local_folder
from merge_cli.recipe.schema import Recipe
from merge_cli.recipe.statistics import statistics_file


def named_files(recipe: Recipe) -> list[Path]:
    """The recipe's own file, and all on this machine that it names besides the models it merges.

    Among them are the folders of teachers.
    """
    parts = [recipe, *recipe.stages, *recipe.sweep.values()]
    recipe_files = [Path(recipe.file)] if recipe.file else []
    files = [local_file(word, part.folder) for part in parts for word in _words(part)]
    teachers = [local_folder(word, part.folder) for part in parts for word in _teachers(part)]
    return [*recipe_files, *(path for path in (*files, *teachers) if path is not None)]


def _words(recipe: Recipe) -> Iterator[str]:
    """What may name a file: data, coefficients, where a search starts, and what tasks say."""
    for spec in recipe.source_specs:
        if spec.data is not None:
            yield from (*spec.data.files, *spec.data.held_out)
    if recipe.coefficients is not None:
        yield recipe.coefficients
    if recipe.statistics_folder is not None:
        for number in range(len(recipe.models)):
            yield f"{recipe.statistics_folder}/{statistics_file(number)}"
    if recipe.search is not None:
        yield recipe.search.start
    for _, word in _texts(recipe):
        yield word
        yield word.rpartition(":")[0]  # file.py:function


def _teachers(recipe: Recipe) -> Iterator[str]:
    for key, word in _texts(recipe):
        if key == "teacher":
            yield word


def _texts(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Every text of the sections that are read as tasks, after the key that it stands under."""
    waiting = [("", node.plain()) for node in (recipe.eval, recipe.objective) if node is not None]
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, str):
            yield key, value
        elif isinstance(value, dict):
            waiting += value.items()
        elif isinstance(value, list):
            waiting += [(key, part) for part in value]
