"""A task: data, what to do with it, and which metrics come out.

A task is a frozen dataclass. Its fields, with their types, defaults and `help`, are the keys that
an evaluation file may hold (`parse.py`), and together with the content of its files they name its
results in the cache.
"""

from __future__ import annotations

import hashlib
import random
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from merge_cli.errors import SourceError
from merge_cli.evaluation.result import TaskResult
from merge_cli.evaluation.rows import Row, read_rows
from merge_cli.evaluation.tokens import TOKENISATION

if TYPE_CHECKING:
    from merge_cli.evaluation.live import LiveModel

T = TypeVar("T")
Tell = Callable[[int, int], None]  # done, total: tokens or examples


def option(default: Any = ..., help: str = "", least: float | None = None) -> Any:
    """A field of a task; without a default it must be given."""
    about = {"help": help, "least": least}
    return field(metadata=about) if default is ... else field(default=default, metadata=about)


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """What every task has.

    Attributes:
        name: how tables and gates call it.
        expert: the source that this data belongs to, for normalising (`compare`).
    """

    kind: ClassVar[str]
    metrics: ClassVar[tuple[str, ...]] = ()  # their names, the primary one first; () if not known
    remembered: ClassVar[bool] = True  # whether results may be found in the cache
    version: ClassVar[int] = 1  # grows when the same task would give other results
    unshared: ClassVar[frozenset[str]] = frozenset({"name", "expert"})

    name: str = option("", "the task's name; default from its data")
    limit: int | None = option(None, "a seeded sample of this many rows", least=1)
    expert: str | None = option(None, "the source that this data belongs to")

    @abstractmethod
    def score(self, live: LiveModel, tell: Tell) -> TaskResult:
        """Evaluate a live model.

        Raises:
            SourceError: data that is not as the task needs it, with file and line.
        """

    def check(self, live: LiveModel) -> None:  # noqa: B027  # most have nothing to look at
        """Look for what is wrong with the data for this model, before anything is run.

        Raises:
            SourceError: with file and line.
        """

    def check_data(self, seed: int) -> None:  # noqa: B027  # most have no files of ours
        """Look for what is wrong with the data for any model, without one.

        Raises:
            SourceError: with file and line.
            ResourceError: a package that the task needs is missing.
        """

    @abstractmethod
    def data_digest(self) -> str:
        """SHA-256 of the data, so that the same data elsewhere is the same task."""

    def identity(self) -> dict[str, Any]:
        """What decides the result, beside the model: JSON-ready."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in self.unshared}
        own.pop("data", None)
        plain = {name: str(v) if isinstance(v, Path) else v for name, v in own.items()}
        about = {"task": self.kind, "version": self.version, "tokenisation": TOKENISATION}
        return {**about, "data": self.data_digest(), **plain}


@dataclass(frozen=True, kw_only=True)
class DataTask(Task):
    """A task over the rows of one file."""

    data: Path = option(help="a file of rows (docs/evaluate.md)")

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
        picked = random.Random(f"{seed}:rows").sample(range(len(rows)), self.limit)
        return [rows[i] for i in sorted(picked)]


def cut_note(count: int, total: int, what: str, tokens: int) -> tuple[str, ...]:
    """What to say of texts that a model does not see whole; nothing where it does.

    Args:
        what: `prompts are`, and what was done about those that are longer.
    """
    if not count:
        return ()
    subject, _, done = what.partition(": ")
    return (f"{count:,} of {total:,} {subject} longer than {tokens:,} tokens: {done}",)


def file_fingerprint(path: Path, stop: threading.Event | None = None) -> str:
    """SHA-256 of a file.

    Args:
        stop: for a thread, which Ctrl-C does not reach: once it is set, what is returned is
            worthless.
    """
    state, block = hashlib.sha256(), bytearray(1 << 20)
    with path.open("rb", buffering=0) as file:
        while (size := file.readinto(block)) and not (stop and stop.is_set()):
            state.update(memoryview(block)[:size])
    return state.hexdigest()
