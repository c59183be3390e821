"""The best candidates of an earlier search: evaluated again before anything new is proposed.

A journal names what each number sets in words, so its candidates fit wherever these words are the
same: with other rows, another seed, wider ranges, another optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merge_cli.errors import UsageError
from merge_cli.evolve.jobs import EvaluationOutcome
from merge_cli.evolve.objectives import Split
from merge_cli.evolve.space import Space
from merge_cli.evolve.static import StaticMerge
from merge_cli.system.records import read_lines
from merge_cli.system.untrusted import read_bytes

_LIMIT = 1 << 30  # bytes of a journal
SUFFIX = ".jsonl"  # of a journal, where `start` may also name a recipe
_HINT = "Start from the best_recipe.yaml beside it: it need not fit."


def earlier_merges(path: Path, space: Space, split: Split, count: int) -> tuple[StaticMerge, ...]:
    """The best candidates of a journal, the best first, each once.

    Args:
        split: that this search scores on; the journal's candidates are ranked by its tasks.
        count: how many, at most.

    Raises:
        UsageError: no journal of a search; one that searched something else, or elsewhere.
    """
    lines = [
        line
        for line in read_lines(read_bytes(path, limit=_LIMIT))[0]
        if line.get("kind") == "candidate" and line["share"] == 1.0 and not line["error"]
    ]
    if not lines:
        message = "has no candidate of a search"
        raise UsageError(message, where=str(path), hint="Name a search_journal.jsonl.")
    _refuse_other_names(path, lines[0], space, split)
    scored = [
        (
            split.score(EvaluationOutcome.from_json(line["number"], line).values).order,
            line["number"],
            line["parameters"],
        )
        for line in lines
    ]
    merges: dict[tuple[float, ...], StaticMerge] = {}
    for _, number, values in sorted(scored, key=lambda item: item[:2]):
        if len(merges) == count:
            break
        genome = _genome(path, values, space)
        name = f"earlier candidate {number + 1}"
        merges.setdefault(tuple(genome), StaticMerge(name, space.recipe(genome), genome))
    return tuple(merges.values())


def _refuse_other_names(path: Path, line: Mapping[str, Any], space: Space, split: Split) -> None:
    """The names are the same in all lines of a journal."""
    ours = [space.describe(gene) for gene in space.genes]
    theirs = line["parameters"]
    tasks = [goal.task for goal in split.goals]
    differences = [
        *(f"it has no '{name}'" for name in ours if name not in theirs),
        *(f"this search has no '{name}'" for name in theirs if name not in ours),
        *(f"it has no task '{name}'" for name in tasks if name not in line["values"]),
    ]
    if differences:
        message = f"is the journal of another search: {'; '.join(differences)}"
        raise UsageError(message, where=str(path), hint=_HINT)


def _genome(path: Path, values: Mapping[str, Any], space: Space) -> list[float]:
    genome = []
    for gene in space.genes:
        name = space.describe(gene)
        value = values[name]
        number = gene.number(value)
        if not _equal(gene.value(number), value):
            message = f"has {name} = {value}, outside this search's range, {gene.searched.allowed}"
            raise UsageError(message, where=str(path), hint=_HINT)
        genome.append(number)
    return genome


def _equal(a: Any, b: Any) -> bool:
    """To the six digits that values have."""
    if isinstance(a, float) and isinstance(b, int | float):
        return abs(a - b) <= 1e-5 * max(abs(a), abs(b))
    return bool(a == b)
