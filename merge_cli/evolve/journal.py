"""Everything that a search has found, a line each, on the disk before the next one counts.

    OUT.search/journal.jsonl     the search's key, then one line for each evaluation
    OUT.search/best_recipe.yaml  the best so far, or the result
    OUT.search/search.json       the record, when the search has ended

There is no other state: optimizers are asked and told again from the journal.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

from merge_cli.checkpoint.raw import write_error
from merge_cli.engine.beside import folder_beside, lock_folder, other_work, replace_file
from merge_cli.errors import CorruptFileError

JOURNAL, BEST, _RECORD = "journal.jsonl", "best_recipe.yaml", "search.json"
Line = dict[str, Any]


class SearchFolder:
    """OUT.search: a context manager that holds its lock.

    Args:
        target: OUT.
        key: of the work; another one's folder is not continued.
        fresh: throw away what is there.

    Attributes:
        lines: what the journal holds, without its first line.
    """

    def __init__(self, target: Path, key: str, *, fresh: bool = False) -> None:
        self.path = folder_beside(target, ".search")
        self.key, self._fresh = key, fresh
        self._lock = self._file = -1
        self.lines: list[Line] = []

    def __enter__(self) -> SearchFolder:
        """Take the lock and read what is there; a line that was cut short is removed.

        Raises:
            ResourceError: another process searches here, or the place cannot be written.
            UsageError: the search of something else is here.
            CorruptFileError: a line in the middle is not JSON.
        """
        self._lock = lock_folder(self.path, "search")
        try:
            if self._fresh:
                for name in (JOURNAL, BEST, _RECORD):
                    (self.path / name).unlink(missing_ok=True)
            self._open()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for fd in (self._file, self._lock):
            if fd >= 0:
                os.close(fd)
        self._file = self._lock = -1

    def append(self, line: Line) -> None:
        """Add a line; it is on the disk when this returns."""
        self.lines.append(line)
        self._write(line)

    def write_best(self, text: str) -> Path:
        """The best recipe so far."""
        return self._replace(BEST, text)

    def finish(self, record: Line) -> None:
        """The search has ended: what it found is known without the journal."""
        self._replace(_RECORD, json.dumps({"key": self.key, **record}, ensure_ascii=False))

    def record(self) -> Line | None:
        """The record of a search that has ended; None while it has not."""
        path = self.path / _RECORD
        if not path.exists():
            return None
        found = json.loads(path.read_text(encoding="utf-8"))
        return dict(found) if found.pop("key", None) == self.key else None

    def discard(self) -> None:
        """Throw the folder away: the model that came of it is published, with the journal."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _open(self) -> None:
        path = self.path / JOURNAL
        raw = path.read_bytes() if path.exists() else b""
        whole = raw[: raw.rfind(b"\n") + 1]
        lines: list[Line] = []
        for number, text in enumerate(whole.splitlines(), start=1):
            try:
                lines.append(json.loads(text))
            except ValueError as error:
                what = f"line {number} of the journal is not JSON: {error}"
                hint = "Start over with --fresh."
                raise CorruptFileError(what, file=str(path), hint=hint) from None
        if lines and lines[0].get("key") != self.key:
            raise other_work("the search", self.path)
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            os.ftruncate(self._file, len(whole))
            os.lseek(self._file, 0, os.SEEK_END)
        except OSError as error:
            raise write_error(error, path) from error
        if not lines:
            self._write({"key": self.key})
        self.lines = lines[1:]

    def _write(self, line: Line) -> None:
        data = memoryview((json.dumps(line, ensure_ascii=False) + "\n").encode())
        try:
            while data:
                data = data[os.write(self._file, data) :]
            os.fsync(self._file)
        except OSError as error:
            raise write_error(error, self.path / JOURNAL) from error

    def _replace(self, name: str, text: str) -> Path:
        replace_file(self.path / name, text.encode())
        return self.path / name
