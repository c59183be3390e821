"""Names of everything that takes part in a comparison: short, and no two alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from merge_cli.checkpoint.source import Source
from merge_cli.comparison.baselines import SOUP, TASK_ARITHMETIC


class EntryNames:
    """Gives names, each once. `base` belongs to the base, baselines have theirs.

    Args:
        base, sources: named by the last part of their names, or as much as tells them apart.

    Attributes:
        of: a source's resolved folder -> its name.
    """

    def __init__(self, base: Source | None, sources: Sequence[Source]) -> None:
        self._taken = {SOUP, TASK_ARITHMETIC}
        self.of: dict[Path, str] = {}
        if base is not None:
            self.of[base.root.resolve()] = self._new(_forms(base))
        self._taken.add("base")
        for source in sources:
            self.of[source.root.resolve()] = self._new(_forms(source))

    def of_recipe(self, file: Path, own: str | None) -> str:
        """A recipe's own name, or its file's, with as much of its path as tells it apart."""
        stem = file.with_suffix("")
        forms = [own] if own else []
        return self._new([*forms, stem.name, "/".join(stem.parts[-2:]), str(stem), str(file)])

    def _new(self, forms: Sequence[str]) -> str:
        counted = (f"{forms[0]} ({number})" for number in range(2, len(self._taken) + 3))
        name = next(form for form in _chain(forms, counted) if form not in self._taken)
        self._taken.add(name)
        return name


def _forms(source: Source) -> list[str]:
    return [source.label.rstrip("/").rpartition("/")[2], source.label, str(source.root)]


def _chain(first: Iterable[str], then: Iterable[str]) -> Iterable[str]:
    yield from first
    yield from then
