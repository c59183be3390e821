"""Rows of one split that are also in another: then what is reported was searched for."""

from __future__ import annotations

from merge_cli.data.sequences import source_contents, source_rows
from merge_cli.errors import MismatchError, Problem
from merge_cli.evaluation.rows import content_of, read_rows
from merge_cli.evaluation.task import DataTask
from merge_cli.evolve.objectives import SPLITS, SearchObjective, parse_objective
from merge_cli.recipe.schema import Recipe

_SHOWN = 5


def refuse_overlap(objective: SearchObjective, recipe: Recipe) -> None:
    """Compare the rows of all splits by content (`evaluation.content`), not by lines or files.

    Rows that Fisher merging looks at may be in the split search where another split chooses.

    Raises:
        MismatchError: rows that two splits share, with file and line of both.
        SourceError: a file that cannot be read.
    """
    seen: dict[bytes, tuple[str, str]] = {}  # content -> (split, file and line)
    problems: list[Problem] = []
    looked_at = {content_of(row): ("data", f"{row.file}:{row.line}") for row in source_rows(recipe)}
    for name in SPLITS:
        if name != "search" or "validation" not in objective.splits:
            seen = {**looked_at, **seen}
        if name not in objective.splits:
            continue
        contents: dict[bytes, tuple[str, str]] = {}
        files = {t.data for t in objective.splits[name].spec.tasks if isinstance(t, DataTask)}
        for path in sorted(files):
            for row in read_rows(path):
                content = content_of(row)
                contents.setdefault(content, (name, f"{path}:{row.line}"))
                if content in seen:
                    split, line = seen[content]
                    origin = "the `data:` of a model" if split == "data" else f"the split {split}"
                    message = f"the split {name} has this row, which is in {origin}, too: "
                    problems.append(Problem(message + line, "", str(path), row.line))
        seen = {**contents, **seen}
    if problems:
        count = len(problems)
        more = [Problem(f"and {count - _SHOWN} more")] if count > _SHOWN else []
        summary = f"the splits of the objective share {count} row{'s' * (count != 1)}"
        raise MismatchError([*problems[:_SHOWN], *more], summary)


def contents_searched(recipe: Recipe) -> set[bytes]:
    """What the rows say that a candidate is made or chosen by: of all splits but `test`.

    Raises:
        RecipeError: a wrong objective.
        SourceError: data that cannot be read.
    """
    if recipe.objective is None:
        return set()
    splits = parse_objective(recipe).splits
    files = {
        task.data
        for name, split in splits.items()
        if name != "test"
        for task in split.spec.tasks
        if isinstance(task, DataTask)
    }
    searched = {content_of(row) for path in files for row in read_rows(path)}
    return searched | source_contents(recipe)
