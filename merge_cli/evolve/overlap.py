"""Rows that a recipe is evaluated on, and that its result was made or chosen with."""

from __future__ import annotations

from collections.abc import Iterator

from merge_cli.dam.data import data_files
from merge_cli.dam.datasets import read_data
from merge_cli.evaluation.content import content_of
from merge_cli.evaluation.rows import Row, read_rows
from merge_cli.evaluation.spec import EvalSpec
from merge_cli.evaluation.task import DataTask
from merge_cli.evolve.objectives import parse_objective
from merge_cli.recipe.schema import Recipe


def overlap_notes(recipe: Recipe, spec: EvalSpec) -> list[str]:
    """What to say of tasks that share rows with what the recipe learns, calibrates or searches on.

    Their numbers, and gates on them, speak of text that the merge was made for.

    Raises:
        RecipeError: a wrong objective.
        SourceError: data that cannot be read.
    """
    known = {content_of(row) for row in _used(recipe)}
    if not known:
        return []
    notes = []
    for task in spec.tasks:
        if not isinstance(task, DataTask):
            continue
        rows = read_rows(task.data)
        count = sum(content_of(row) in known for row in rows)
        if count:
            what = f"{count:,} of {len(rows):,} rows of the evaluation {task.name} are among those "
            notes.append(f"{what}that this recipe is made or chosen by: its numbers flatter it")
    return notes


def _used(recipe: Recipe) -> Iterator[Row]:
    """Rows of the sources' data, held out or not, and of the splits that something is chosen by."""
    for source in recipe.source_specs:
        if source.data is not None:
            yield from read_data(source.data, data_files(source.data.files, recipe))
            if source.data.held_out:
                files = data_files(source.data.held_out, recipe)
                yield from read_data(source.data, files, held_out=True)
    if recipe.objective is None:
        return
    for name, split in parse_objective(recipe).splits.items():
        if name != "test":
            for path in {t.data for t in split.spec.tasks if isinstance(t, DataTask)}:
                yield from read_rows(path)
