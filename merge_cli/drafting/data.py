"""Data of the models that a first recipe merges: given, or found beside them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from merge_cli.errors import MergeCliError, UsageError
from merge_cli.options import MergeOptions
from merge_cli.planning.planner import make_plan
from merge_cli.planning.preparation import preparations_of
from merge_cli.recipe.data import Data
from merge_cli.recipe.reference import ModelRef, parse_reference
from merge_cli.recipe.schema import Recipe

_NAMES = ("{}.train.jsonl", "{}.jsonl", "{}.train.parquet", "{}.parquet", "{}.txt")
# What takes data and nothing else that `init` would have to ask for.
METHODS = ("auto", "fisher", "regmean", "dam")


def data_of(models: Sequence[str], given: Sequence[Path]) -> tuple[str, ...]:
    """A file for each model; empty where not every model has one.

    Args:
        models: folders or Hub ids.
        given: a file for each of them, in their order; empty looks for files that are called like
            the models, beside them, in a folder `data` there, or where we stand.

    Raises:
        UsageError: fewer or more files than models, or a file that does not exist.
    """
    if given:
        if len(given) != len(models):
            message = f"{len(given)} of --data for {len(models)} models"
            raise UsageError(message, hint="Give --data FILE once for each --model, in order.")
        for path in given:
            if not path.is_file():
                raise UsageError("no such file", where=str(path), hint="Check --data.")
        return tuple(str(path) for path in given)
    files = [_beside(model) for model in models]
    return tuple(str(path) for path in files if path) if all(files) else ()


def data_by_model(recipe: Recipe, models: Sequence[str], files: Sequence[str]) -> tuple[str, ...]:
    """The files of a recipe's models, which has each model once.

    Args:
        models: as they were named, perhaps twice, or the base among them.
        files: of these, one each.

    Raises:
        UsageError: a file of a model that is none of the recipe's.
    """
    taken: dict[ModelRef, str] = {}
    for model, file in zip(models, files, strict=True):
        reference = parse_reference(model, recipe.folder)
        if reference in taken or all(spec.model != reference for spec in recipe.models):
            message = f"{model} is named twice, or is the base: its data ({file}) have no model"
            raise UsageError(message, hint="Name every --model, and its --data, once.")
        taken[reference] = file
    return tuple(taken[spec.model] for spec in recipe.models)


def with_data(recipe: Recipe, files: Sequence[str]) -> Recipe:
    """A recipe whose models have these files, one each."""
    models = tuple(
        replace(spec, data=Data(files=(file,)))
        for spec, file in zip(recipe.models, files, strict=True)
    )
    return replace(recipe, models=models)


def why_not(recipe: Recipe, options: MergeOptions) -> str:
    """Why a method that looks at data cannot take a recipe's; empty where it can."""
    try:
        plan = make_plan(recipe)
        for preparation in preparations_of(plan):
            preparation.plan(plan, options)
    except MergeCliError as error:
        return str(error).splitlines()[0]
    return ""


def _beside(model: str) -> Path | None:
    return next((path for path in _places(model) if path.is_file()), None)


def _places(model: str) -> Iterator[Path]:
    path = Path(model)
    folders = [path.parent, path.parent / "data"] if path.is_dir() else []
    stem = path.resolve().name if path.is_dir() else path.name
    for folder in dict.fromkeys([*folders, Path("data"), Path()]):
        yield from (folder / name.format(stem) for name in _NAMES)
