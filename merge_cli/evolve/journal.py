"""Everything that a search has found, a line each, on the disk before the next one counts.

    OUT.search/journal.jsonl     the search's key, then one line for each evaluation
    OUT.search/best_recipe.yaml  the best so far, or the result
    OUT.search/search.json       the record, when the search has ended

There is no other state: optimizers are asked and told again from the journal.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from merge_cli.checkpoint.raw import replace_file
from merge_cli.engine.records import Records
from merge_cli.engine.workspace import Workspace
from merge_cli.sealed import read_sealed, seal

if TYPE_CHECKING:
    from typing_extensions import Self

BEST, _RECORD = "best_recipe.yaml", "search.json"
Line = dict[str, Any]


class SearchWorkspace(Workspace):
    """OUT.search: a context manager that holds its lock.

    Args:
        target: OUT.
        key: of the work; another one's folder is not continued.
        fresh: throw away what is there.

    Attributes:
        lines: what the journal holds, without its first line.
    """

    def __init__(self, target: Path, key: str, *, fresh: bool = False) -> None:
        super().__init__(target, ".search", "search")
        self.key, self._fresh = key, fresh
        self._records: Records | None = None
        self.lines: list[Line] = []

    def __enter__(self) -> Self:
        """Take the lock and read what is there, up to the first line that does not hold.

        Raises:
            ResourceError: another process searches here, or the place cannot be written.
            UsageError: the search of something else is here, or somebody else's folder.
        """
        super().__enter__()
        try:
            if self._fresh:
                self.discard()
            if Records.key_of(self.journal) not in (None, self.key):
                raise self.other_work()
            self.make()
            self._records = Records(self.journal, self.key, durable=True)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        self.lines = list(self._records.entries)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._records is not None:
            self._records.close()
            self._records = None
        super().__exit__(kind, error, trace)

    def append(self, line: Line) -> None:
        """Add a line; it is on the disk when this returns."""
        assert self._records is not None, "it is entered"
        self.lines.append(line)
        self._records.append(line)

    def write_best(self, text: str) -> Path:
        """The best recipe so far."""
        replace_file(self.path / BEST, text.encode())
        return self.path / BEST

    def finish(self, record: Line) -> None:
        """The search has ended: what it found is known without the journal."""
        replace_file(self.path / _RECORD, seal({"key": self.key, **record}))

    def record(self) -> Line | None:
        """The record of a search that has ended; None while it has not."""
        found = read_sealed(self.path / _RECORD) or {}
        return found if found.pop("key", None) == self.key else None
