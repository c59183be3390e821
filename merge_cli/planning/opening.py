"""The models of a recipe, each opened once, whatever the recipe calls it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from merge_cli.errors import (
    MergeCliError,
    MismatchError,
    Problem,
    SourceError,
)
from merge_cli.formats.detect import advice
from merge_cli.lora.adapter import open_alone
from merge_cli.recipe.reference import ModelRef, local_folder
from merge_cli.recipe.schema import Recipe
from merge_cli.sources.opening import open_source
from merge_cli.sources.source import Source


def one_spelling(recipe: Recipe) -> Recipe:
    """`base` and `./base` are one model: named as the recipe names it first."""
    first: dict[Path, ModelRef] = {}
    spelling: dict[ModelRef, ModelRef] = {}
    for model in recipe.references:
        folder = local_folder(model.path, recipe.folder)
        is_local = folder is not None and not model.lora
        spelling[model] = (
            first.setdefault(folder.resolve(), model) if folder and is_local else model
        )
    return recipe.with_models(spelling)


def open_all(recipe: Recipe, made: Mapping[str, Source]) -> tuple[Recipe, list[Source]]:
    """Open every model, the base first.

    Args:
        made: the results of other documents, by name: open already.

    Returns:
        the recipe with one spelling for each model, and the sources, each once.

    Raises:
        SourceError: a model that cannot be opened, or whose weights are quantised.
        MismatchError: several that cannot be opened.
    """
    opened: dict[ModelRef, Source] = {}
    first: dict[tuple[Path, ...], ModelRef] = {}
    spelling: dict[ModelRef, ModelRef] = {}
    errors: dict[ModelRef, MergeCliError] = {}
    for reference in recipe.references:
        try:
            source = made.get(str(reference)) or open_source(reference, recipe.folder)
        except SourceError as error:
            errors[reference] = error
            continue
        # `base` and `./base`, a branch and its commit: one model, whose spelling decides nothing.
        spelling[reference] = first.setdefault(source.identity, reference)
        opened.setdefault(spelling[reference], source)
    if len(errors) == 1:
        [(reference, alone)] = errors.items()
        raise alone.at(recipe.problem(_key(recipe, reference), "").position)
    if errors:
        problems = [
            recipe.problem(_key(recipe, reference), str(why)) for reference, why in errors.items()
        ]
        raise MismatchError(problems, f"{len(errors)} models cannot be opened")
    for source in opened.values():
        refused = advice(source.config)
        if refused is not None:
            method, hint = refused
            message = f"its weights are quantised ({method})"
            raise SourceError(message, model=source.label, hint=hint)
    return recipe.with_models(spelling), list(opened.values())


def unopenable(recipe: Recipe) -> Iterator[Problem]:
    """What is wrong with the local models of a recipe that has other problems, too.

    So that all of them are told at once. The Hub is not asked.
    """
    documents = {stage.name for stage in recipe.stages}
    for document in (*recipe.stages, recipe):
        for reference in document.references:
            words = (reference.path, reference.lora or reference.path)
            here = all(
                local_folder(word, document.folder) or word.startswith((".", "/", "~"))
                for word in words
            )
            if not here or str(reference) in documents:
                continue
            try:
                _open(document, reference)
            except SourceError as error:
                yield document.problem(_key(document, reference), str(error))


def _open(recipe: Recipe, reference: ModelRef) -> None:
    """Open a model, or in a merge of adapters an adapter: their base is not read."""
    if recipe.output is None:
        open_source(reference, recipe.folder)
    elif any(spec.model == reference for spec in recipe.models):
        open_alone(reference, recipe.folder)


def _key(recipe: Recipe, reference: ModelRef) -> str:
    """Where a recipe names a model."""
    keys = ["base_model"] if recipe.base_model == reference else []
    keys += [spec.key for spec in recipe.source_specs if spec.model == reference]
    positions = (key for word in keys for key in (f"{word}.model", word) if key in recipe.positions)
    return next(positions, "")


def files_of(source: Source) -> frozenset[str]:
    """The names of a model's files, here or on the Hub."""
    local_names = {path.name for path in source.root.iterdir()} if source.root.is_dir() else set()
    return frozenset(local_names | set(source.repository.files if source.repository else ()))
