"""The base class of evaluation tasks, and their options.

A task is a frozen dataclass. Its fields, with their types, defaults and `help`, are the keys that
an evaluation file may hold (`parse.py`), and together with the content of its files they name its
results in the cache.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from merge_cli.checkpoint.fingerprint import file_fingerprint
from merge_cli.errors import SourceError
from merge_cli.evaluation.result import TaskResult
from merge_cli.evaluation.rows import Row, read_rows
from merge_cli.evaluation.tokens import TOKENISATION
from merge_cli.recipe.forms import PathForm, Text
from merge_cli.recipe.sections import option

if TYPE_CHECKING:
    from merge_cli.evaluation.live import LiveModel
    from merge_cli.sources.source import Source

T = TypeVar("T")
OnProgress = Callable[[int, int], None]  # done, total: tokens or examples


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """The common part of all tasks.

    Attributes:
        name: in tables and gates.
        expert: the source that this data belongs to, for normalising (`compare`).
    """

    kind: ClassVar[str]
    metrics: ClassVar[tuple[str, ...]] = ()  # names, the primary one first; () if unknown
    is_cached: ClassVar[bool] = True  # whether results may come from the cache
    version: ClassVar[int] = 1  # grows when the same task would give other results
    not_in_identity: ClassVar[frozenset[str]] = frozenset({"name", "expert"})

    name: str = option("", "the task's name; default from its data", form=Text(line=True))
    limit: int | None = option(None, "a seeded sample of this many rows", least=1)
    expert: str | None = option(None, "the source that this data belongs to", form=Text(line=True))

    @abstractmethod
    def score(self, live: LiveModel, on_progress: OnProgress) -> TaskResult:
        """Evaluate a live model.

        Raises:
            SourceError: data that is not as the task needs it, with file and line.
        """

    def check(self, live: LiveModel) -> None:  # noqa: B027  # most have nothing to check
        """Check the data for this model, before anything is run.

        Raises:
            SourceError: with file and line.
        """

    def check_data(self, seed: int) -> None:  # noqa: B027  # most have no files of ours
        """Look for what is wrong with the data for any model, without one.

        Raises:
            SourceError: with file and line.
            ResourceError: a package that the task needs is missing.
        """

    def files(self) -> tuple[Path, ...]:
        """The files on this machine that it reads."""
        return ()

    def models(self) -> tuple[Source, ...]:
        """The models that it reads besides the one that it scores."""
        return ()

    @abstractmethod
    def data_digest(self) -> str:
        """SHA-256 of the data, so that the same data elsewhere is the same task."""

    def identity(self) -> dict[str, Any]:
        """Everything but the model that decides the result: JSON-ready."""
        options = {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.name not in self.not_in_identity
        }
        options.pop("data", None)
        plain = {name: str(v) if isinstance(v, Path) else v for name, v in options.items()}
        kind = {"task": self.kind, "version": self.version, "tokenisation": TOKENISATION}
        return {**kind, "data": self.data_digest(), **plain}


@dataclass(frozen=True, kw_only=True)
class DataTask(Task):
    """A task over the rows of one file."""

    data: Path = option(help="a file of rows (docs/evaluate.md)", form=PathForm(exists=True))

    def files(self) -> tuple[Path, ...]:
        return (self.data,)

    def data_digest(self) -> str:
        try:
            return file_fingerprint(self.data)
        except FileNotFoundError:
            raise SourceError("no such data file", file=str(self.data)) from None
        except OSError as error:
            raise SourceError(f"cannot be read: {error.strerror}", file=str(self.data)) from None

    def check_data(self, seed: int) -> None:
        for row in self.sample(read_rows(self.data), seed):
            self.check_row(row)

    def check_row(self, row: Row) -> None:  # what a row must have, tasks say
        """Raise a SourceError for a row that is not as the task needs it."""

    def sample(self, rows: Sequence[T], seed: int) -> list[T]:
        """`limit` of the rows, in their order."""
        if self.limit is None or self.limit >= len(rows):
            return list(rows)
        numbers = random.Random(f"{seed}:rows").sample(range(len(rows)), self.limit)
        return [rows[i] for i in sorted(numbers)]


def cut_note(count: int, total: int, description: str, tokens: int) -> tuple[str, ...]:
    """A note on texts that a model does not see completely; empty without such texts.

    Args:
        description: `prompts are`, and what was done about those that are longer.
    """
    if not count:
        return ()
    subject, _, done = description.partition(": ")
    return (f"{count:,} of {total:,} {subject} longer than {tokens:,} tokens: {done}",)
