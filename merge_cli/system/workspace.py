"""A folder of unfinished work beside OUT: one process at a time, one work at a time, and ours.

    OUT.ENDING.lock          held from beginning to end, by one process
    OUT.ENDING/merge-cli     says whose folder this is: made first, removed last
    OUT.ENDING/journal.jsonl what is done, and the key of the work

Everything that is made in steps is made in one: what becomes OUT (engine/output.py, .partial),
training (.training), searches (.search), the results of stages (.stages). What several processes
may make at once (caches) takes the lock of the file itself: `lock_file`.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from merge_cli.errors import ResourceError, UsageError
from merge_cli.system.notices import say_once
from merge_cli.system.paths import require_text
from merge_cli.system.raw_io import replace_file, write_error
from merge_cli.system.records import Records, read_sealed, seal
from merge_cli.system.untrusted import Unreadable, parse_json, read_bytes

if TYPE_CHECKING:
    from typing_extensions import Self

MARK, JOURNAL = "merge-cli", "journal.jsonl"
_PATIENCE = 3.0  # seconds: what a killed process has left of itself is gone by then
_OTHER = "of another recipe, other inputs or another version is in the way"
_HINT = "Finish it with the command that started it, or discard it with --fresh."


class Workspace:
    """A folder beside OUT, as a context manager: locked inside, kept for resuming outside.

    Args:
        target: OUT.
        suffix: of the folder.
        work: what is done in it, for messages.

    Attributes:
        target: OUT, links resolved.
        path: the folder.
        lock: the descriptor of its lock, where it is held. A child that has inherited it keeps
            others out until it has ended, too.
    """

    def __init__(self, target: Path, suffix: str, work: str) -> None:
        require_text(target)
        self.target = Path(os.path.realpath(target))
        if not self.target.name:
            raise UsageError("the output cannot be the root of the file system")
        self.path = self.target.with_name(self.target.name + suffix)
        self.work, self.lock = work, -1
        self._lock_path = self.path.with_name(f"{self.path.name}.lock")

    @property
    def journal(self) -> Path:
        """The file of what is done."""
        return self.path / JOURNAL

    def __enter__(self) -> Self:
        """Take the lock.

        Raises:
            UsageError: the folder is somebody else's.
            ResourceError: another process works here, or the place cannot be written.
        """
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self._acquire()
        except OSError as error:
            locked = os.path.lexists(self._lock_path)  # by somebody else's file, or a folder
            raise write_error(error, self._lock_path if locked else self.target.parent) from error
        try:
            self.refuse_strangers()
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
        if self.lock < 0:
            return
        try:  # while held: whoever waits for this file notices that it is another one by then
            self._lock_path.unlink(missing_ok=True)
        except OSError as failure:  # a lock file that stays keeps nobody out
            say_once(f"{self._lock_path} cannot be removed ({failure.strerror}); it does no harm")
        finally:
            os.close(self.lock)
            self.lock = -1

    def refuse_strangers(self) -> None:
        """Raise if the folder is there, and not one that was made here.

        Raises:
            UsageError: it would be thrown away.
        """
        if not self.path.exists() and not self.path.is_symlink():
            return
        try:
            ours = self.path.is_dir() and not self.path.is_symlink() and self._is_ours()
        except OSError as error:
            raise write_error(error, self.path) from error
        if not ours:
            message = f"is not an unfinished {self.work}, and would be replaced"
            hint = "Choose another OUT, or remove it yourself."
            raise UsageError(message, where=str(self.path), hint=hint)

    def make(self) -> Path:
        """Make the folder, and say whose it is.

        Raises:
            ResourceError: it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not (self.path / MARK).exists():
                text = f"An unfinished {self.work}: the same command continues it.\n"
                (self.path / MARK).write_text(text, encoding="utf-8")
        except OSError as error:
            raise write_error(error, self.path) from error
        return self.path

    def resume_work(self, key: str, *, fresh: bool = False) -> None:
        """Continue the work of this key; without any, begin it.

        Args:
            fresh: throw away what is there.

        Raises:
            UsageError: unfinished work of something else is here.
            ResourceError: the folder cannot be written.
        """
        if fresh:
            self.discard()
        if self.key_here() not in (None, key):
            raise self.other_work()
        self.make()

    def key_here(self) -> str | None:
        """The key of the work that is here; None where nothing is that holds."""
        return Records.key_of(self.journal)

    def write_record(self, name: str, key: str, record: Mapping[str, Any]) -> None:
        """Write what the work of this key has come to, whole or not at all.

        Raises:
            ResourceError: it cannot be written.
        """
        replace_file(self.path / name, seal({"key": key, **record}))

    def read_record(self, name: str, key: str) -> dict[str, Any] | None:
        """What `write_record` has written for this key; None where it is absent or damaged."""
        record = read_sealed(self.path / name) or {}
        return record if record.pop("key", None) == key else None

    def other_work(self) -> UsageError:
        """The error for unfinished work of something else."""
        message = f"an interrupted {self.work} {_OTHER}"
        return UsageError(message, where=str(self.path), hint=_HINT)

    def discard(self) -> None:
        """Throw the folder away.

        The journal goes first: half of a folder without one is nothing, with one it is work. What
        says whose it is goes last.
        """
        if not self.path.is_dir():
            return
        self.journal.unlink(missing_ok=True)
        for path in self.path.iterdir():
            if path.name == MARK:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        shutil.rmtree(self.path, ignore_errors=True)

    def _is_ours(self) -> bool:
        """Whether it carries our mark, is empty, or has a journal of versions without marks."""
        names = {path.name for path in self.path.iterdir()}
        if MARK in names or not names:
            return True
        try:
            first = read_bytes(self.journal, limit=2**33).partition(b"\n")[0]
            entry = parse_json(first)
        except Unreadable:
            return False
        return isinstance(entry, dict) and {"key", "boot"} <= entry.keys()

    def _acquire(self) -> None:
        until = time.monotonic() + _PATIENCE
        while (lock := lock_file(self._lock_path)) is None:
            if time.monotonic() > until:
                message = f"another {self.work} is writing here"
                hint = "Wait for it, or choose another OUT."
                raise ResourceError(message, where=str(self.target), hint=hint)
            time.sleep(0.05)
        self.lock = lock


def lock_file(path: Path, *, wait: bool = False) -> int | None:
    """Make or open a file, and take its lock: a descriptor; None while another process has it.

    Args:
        wait: until the other process lets go of it.

    Raises:
        OSError: it cannot be opened.
    """
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return None
        except BaseException:
            os.close(lock)
            raise
        if is_at(path, lock):
            return lock
        # Removed or renamed by its owner between our open and our lock: what we hold is a file
        # without a name, which keeps nobody out.
        os.close(lock)


def is_at(path: Path, descriptor: int) -> bool:
    """Whether an open file is still the one of this name."""
    try:
        return os.stat(path).st_ino == os.fstat(descriptor).st_ino
    except FileNotFoundError:
        return False


class JournalWorkspace(Workspace):
    """A workspace whose work goes on from the lines of its journal.

    Args:
        key: of the work; the folder of other work is refused.
        fresh: throw away earlier work.

    Attributes:
        lines: of the journal, without the first, up to the first damaged one.
    """

    def __init__(self, target: Path, suffix: str, work: str, key: str, *, fresh: bool) -> None:
        super().__init__(target, suffix, work)
        self.key, self._fresh = key, fresh
        self._records: Records | None = None
        self.lines: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        """Take the lock and read the journal.

        Raises:
            ResourceError: another process works here, or the folder cannot be written.
            UsageError: the folder is of other work, or not of merge-cli.
        """
        super().__enter__()
        try:
            self.resume_work(self.key, fresh=self._fresh)
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

    def append(self, line: dict[str, Any]) -> None:
        """Add a line; it is on disk when this returns."""
        assert self._records is not None, "it is entered"
        self.lines.append(line)
        self._records.append(line)
