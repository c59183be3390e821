"""`statistics: FOLDER`: what was gathered before, held against the models that it is used for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from merge_cli.checkpoint.statistics import (
    CalibrationStatistics,
    StatisticsFile,
    open_statistics_files,
)
from merge_cli.errors import MismatchError, Problem, SourceError
from merge_cli.planning.draft import Draft
from merge_cli.recipe.reference import local_folder
from merge_cli.recipe.statistics import ORIGIN, statistics_file
from merge_cli.tokenizer.renumbering import vocabulary_notes


def open_statistics_folder(draft: Draft) -> Draft:
    """The recipe's folder of statistics, of which a resolved recipe keeps the digests.

    Raises:
        CorruptFileError: a file that is missing or broken.
        MismatchError: they do not fit the merged tensors, or the models share no vocabulary.
        RecipeError: the recipe changes the vocabulary.
        SourceError: a resolved recipe was made with others, or there are more than models.
    """
    recipe, name = draft.recipe, draft.recipe.statistics_folder
    folder = local_folder(name, recipe.folder) if name else None
    if folder is None:
        return draft
    count = len(recipe.models)
    files = [folder / statistics_file(number) for number in range(count)]
    calibrated = open_statistics_files(files, draft.method.gathers)
    more = folder / statistics_file(count)
    if more.exists():
        message = f"is there, and the recipe has {count} models"
        hint = "A folder of statistics has one file for each model, in the recipe's order."
        raise SourceError(message, file=str(more), hint=hint)
    draft.aligned.refuse_rearranged(recipe, recipe.merge_method)
    if others := [*vocabulary_notes(draft.sources)]:
        problems = [Problem(note.partition(";")[0].partition(", and ")[0]) for note in others]
        raise MismatchError(problems, "the models share no vocabulary")
    covered = _covered(draft, calibrated)
    origins = _origins(draft, calibrated)
    merged = sum(task.action == "merge" for task in draft.tasks)
    note = f"statistics of {count} models are read from {name}, for {covered:,} merged tensors"
    if merged > covered:
        note += f"; {merged - covered:,} have none in some model and are the plain mean"
    recipe = replace(recipe, metadata={**recipe.metadata, ORIGIN: origins})
    return draft.noting((note,), calibrated=calibrated, recipe=recipe)


def _covered(draft: Draft, calibrated: CalibrationStatistics) -> int:
    """How many merged tensors every model has statistics of.

    Raises:
        MismatchError: none, or some of another shape.
    """
    tasks = [task for task in draft.tasks if task.action == "merge"]
    wrong = ((task, calibrated.misfit(task.operands, task.ids)) for task in tasks)
    problems = [Problem(misfit, task.name) for task, misfit in wrong if misfit]
    covered = sum(calibrated.of(t.operands, t.ids).complete is not None for t in tasks)
    if not covered and not problems:
        message = "they are of no tensor that is merged: all would be plain means"
        problems = [Problem(message, hint="Are they of these models?")]
    if problems:
        name = draft.recipe.statistics_folder
        raise MismatchError(problems, f"the statistics in {name} do not fit these models")
    return covered


def _origins(draft: Draft, calibrated: CalibrationStatistics) -> list[dict[str, Any]]:
    """What the resolved recipe says of each file.

    Raises:
        SourceError: it was resolved with another one.
    """
    recipe = draft.recipe
    listed = recipe.metadata.get(ORIGIN)
    recorded = listed if isinstance(listed, list) else []
    recorded = [*recorded, *[None] * len(calibrated.files)]
    result = []
    for spec, file, item in zip(recipe.models, calibrated.files, recorded, strict=False):
        earlier = item if isinstance(item, Mapping) else {}
        is_other = earlier.get("statistics", file.digest) != file.digest
        if is_other and recipe.inputs:
            message = "are not the statistics that this recipe was resolved with"
            hint = "Restore the file, or remove `inputs` from the recipe."
            raise SourceError(message, file=str(file.path), hint=hint)
        kept = {} if is_other else earlier
        result.append({**kept, **_about(Path(spec.model.path).name, file)})
    return result


def _about(model: str, file: StatisticsFile) -> dict[str, Any]:
    about = {key: file.about[key] for key in ("examples", "tokens") if key in file.about}
    return {"model": model, **about, "statistics": file.digest}
