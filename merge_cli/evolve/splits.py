"""Rows of one split that are also in another: then what is reported was searched for.

Rows that a recipe is evaluated on, and that its result was made or chosen with.
"""

from __future__ import annotations

from collections.abc import Iterator

from merge_cli.dam.data import data_files
from merge_cli.dam.datasets import read_data
from merge_cli.errors import MismatchError, Problem
from merge_cli.evaluation.rows import Row, content_of, read_rows
from merge_cli.evaluation.spec import EvalSpec
from merge_cli.evaluation.task import DataTask
from merge_cli.evolve.objectives import SPLITS, SearchObjective, parse_objective
from merge_cli.recipe.schema import Recipe

_SHOWN = 5


def refuse_overlap(objective: SearchObjective) -> None:
    """Compare the rows of all splits by content (`evaluation.content`), not by lines or files.

    Raises:
        MismatchError: rows that two splits share, with file and line of both.
        SourceError: a file that cannot be read.
    """
    seen: dict[bytes, tuple[str, str]] = {}  # content -> (split, place)
    problems: list[Problem] = []
    for name in SPLITS:
        if name not in objective.splits:
            continue
        own: dict[bytes, tuple[str, str]] = {}
        files = {t.data for t in objective.splits[name].spec.tasks if isinstance(t, DataTask)}
        for path in sorted(files):
            for row in read_rows(path):
                digest = content_of(row)
                own.setdefault(digest, (name, f"{path}:{row.line}"))
                if digest in seen:
                    split, place = seen[digest]
                    message = f"the split {name} has this row, which is in the split {split}, too: "
                    problems.append(Problem(message + place, "", str(path), row.line))
        seen = {**own, **seen}
    if problems:
        count = len(problems)
        more = [Problem(f"and {count - _SHOWN} more")] if count > _SHOWN else []
        summary = f"the splits of the objective share {count} row{'s' * (count != 1)}"
        raise MismatchError([*problems[:_SHOWN], *more], summary)


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
            message = (
                f"{count:,} of {len(rows):,} rows of the evaluation {task.name} are among those "
            )
            notes.append(f"{message}that this recipe is made or chosen by: its numbers flatter it")
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
