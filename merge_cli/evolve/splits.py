"""Rows of one split that are also in another: then what is reported was searched for."""

from __future__ import annotations

from merge_cli.errors import MismatchError, Problem
from merge_cli.evaluation.content import content_of
from merge_cli.evaluation.rows import read_rows
from merge_cli.evaluation.task import DataTask
from merge_cli.evolve.objectives import SPLITS, SearchObjective

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
                    what = f"the split {name} has this row, which is in the split {split}, too: "
                    problems.append(Problem(what + place, "", str(path), row.line))
        seen = {**own, **seen}
    if problems:
        count = len(problems)
        more = [Problem(f"and {count - _SHOWN} more")] if count > _SHOWN else []
        summary = f"the splits of the objective share {count} row{'s' * (count != 1)}"
        raise MismatchError([*problems[:_SHOWN], *more], summary)
