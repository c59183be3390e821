"""OUT: worked on in `OUT.partial/`, published by one rename, never seen half done.

    OUT.partial.lock          held from beginning to end, by one process
    OUT.partial/journal.jsonl what is done
    OUT.partial/model/        becomes OUT
    OUT.partial/replaced/     the OUT that --overwrite is replacing, between two renames

Whatever moment a process is killed at, the next one finds one of four states: nothing, work to
continue, a finished model between two renames, or a published model with leftovers.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from merge_cli.checkpoint.coefficients import FILE
from merge_cli.checkpoint.components import PIPELINE
from merge_cli.checkpoint.layout import Shard
from merge_cli.checkpoint.raw import allocate, has_header, write_error
from merge_cli.checkpoint.shards import INDEX
from merge_cli.engine.journal import Journal
from merge_cli.errors import ResourceError, UsageError
from merge_cli.sizes import show_size

_OURS = {"journal.jsonl", "journal.new", "model", "replaced"}
# What --overwrite may replace: folders that look like a model.
_SIGNS = ("config.json", "merge_recipe.yaml", "model.safetensors", INDEX, PIPELINE,
          "adapter_config.json")  # fmt: skip


class WorkFolder:
    """A context manager: locked inside, unlocked (and kept for resuming) outside.

    Attributes:
        target: the folder to publish, links resolved.
        model: where the model is made.
    """

    def __init__(self, target: Path) -> None:
        self.target = Path(os.path.realpath(target))
        if not self.target.name:
            raise UsageError("the output cannot be the root of the file system")
        self.partial = self.target.with_name(self.target.name + ".partial")
        self.model = self.partial / "model"
        self._replaced = self.partial / "replaced"
        self._journal_path = self.partial / "journal.jsonl"
        self._lock_path = self.target.with_name(self.target.name + ".partial.lock")
        self._lock = -1

    def __enter__(self) -> WorkFolder:
        """Take the lock, and put back what a killed --overwrite had moved aside.

        Raises:
            ResourceError: another process is working here, or the place cannot be written.
        """
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self._acquire()
            if self._replaced.exists() and not self.target.exists():
                os.rename(self._replaced, self.target)
        except OSError as error:
            raise write_error(error, self.target.parent) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Removed while held: whoever waits for this file notices that it is another one by then.
        self._lock_path.unlink(missing_ok=True)
        os.close(self._lock)

    def refuse(self, overwrite: bool, precious: Iterable[Path]) -> None:
        """Raise if OUT is there and may not go.

        Args:
            precious: files and folders that must survive: sources, the recipe, where we stand.

        Raises:
            UsageError: OUT is a file, holds something precious, or exists without --overwrite.
        """
        if self.target.exists() and not self.target.is_dir():
            raise UsageError("the output is a file", where=str(self.target))
        if self.partial.exists() and {p.name for p in self.partial.iterdir()} - _OURS:
            what, hint = "is not an unfinished merge, and would be replaced", "Choose another OUT."
            raise UsageError(what, where=str(self.partial), hint=hint)
        for path in precious:
            real = Path(os.path.realpath(path))
            taken = (self.target, self.partial)
            if real in taken or any(place in real.parents for place in taken):
                raise UsageError(
                    f"the output would replace {real}, which the merge needs",
                    hint="Choose another folder.",
                )
        if not self.target.is_dir() or not any(self.target.iterdir()):
            return
        if not overwrite:
            hint = "Choose another folder, or replace it with --overwrite."
            raise UsageError("the output exists already", where=str(self.target), hint=hint)
        if not any((self.target / name).exists() for name in _SIGNS):
            what = "the output exists and is not a model: it will not be replaced"
            hint = "Choose another folder, or remove it yourself."
            raise UsageError(what, where=str(self.target), hint=hint)

    def check_space(self, needed: int) -> None:
        """Raise if the disk has no room for what is not there yet.

        Raises:
            ResourceError: names what is needed and what is free.
        """
        present = sum(f.stat().st_blocks * 512 for f in self.model.rglob("*.safetensors"))
        place = self.target.parent
        while not place.exists():  # a dry run creates no folders
            place = place.parent
        free = shutil.disk_usage(place).free
        if needed - present > free:
            what = f"the disk is too full: {show_size(needed - present)} needed, "
            raise ResourceError(what + f"{show_size(free)} free", where=str(self.target.parent))

    def published(self, key: str) -> bool:
        """Whether OUT is the result of this very work, by a process killed while tidying up.

        OUT itself says so, in its report: nothing that is left of the work would prove it.
        """
        report = self.target / "merge_report.json"
        if not self.partial.exists() or not report.is_file():
            return False
        try:
            return bool(json.loads(report.read_text(encoding="utf-8")).get("work") == key)
        except (ValueError, AttributeError):
            return False  # somebody else's file

    def refuse_other_work(self, key: str) -> None:
        """Raise rather than throw away what another merge into the same OUT has done.

        Raises:
            UsageError: the journal has units of other work.
        """
        if not self._journal_path.exists() or Journal.key_of(self._journal_path) == key:
            return
        if self.model.exists() and b'"unit"' in self._journal_path.read_bytes():
            what = "an interrupted merge of another recipe, other inputs or another version is here"
            hint = "Finish it with its own command, or throw it away with --fresh."
            raise UsageError(what, where=str(self.partial), hint=hint)

    def open_journal(self, key: str, shards: tuple[Shard, ...]) -> Journal:
        """Continue earlier work if it is this work and whole; otherwise start over.

        Raises:
            ResourceError: the folder cannot be written, or the disk is full.
        """
        found = self._journal_path.exists()
        if found and Journal.key_of(self._journal_path) == key and self._holds(shards):
            return Journal(self._journal_path, key)
        self.discard()
        try:
            self.model.mkdir(parents=True)
            for folder in {shard.folder for shard in shards} - {""}:
                (self.model / folder).mkdir()
        except OSError as error:
            raise write_error(error, self.partial) from error
        for shard in shards:
            allocate(self.model / shard.file, shard.size, shard.header)
        # The journal comes last: where there is one, every shard has its size and its header.
        return Journal(self._journal_path, key)

    def clear_companions(self, shards: tuple[Shard, ...]) -> None:
        """Remove what an earlier run, perhaps with other flags, has put beside the shards."""
        kept = {self.model / shard.file for shard in shards}
        folders = {self.model / shard.folder for shard in shards}
        for path in [*self.model.iterdir(), *(p for f in folders for p in f.iterdir())]:
            if path.is_dir() and path not in folders:
                shutil.rmtree(path)
            elif path.is_file() and path not in kept:
                path.unlink()

    def publish(self, *, fsync: bool) -> None:
        """Make the finished model OUT; an OUT that may be replaced moves aside first.

        Raises:
            ResourceError: a rename failed.
        """
        try:
            if fsync:
                sync([*(p for p in self.model.rglob("*")), self.model, self.partial])
            if self.target.is_dir() and any(self.target.iterdir()):
                os.rename(self.target, self._replaced)
            os.rename(self.model, self.target)
            if fsync:
                sync([self.target.parent])
        except OSError as error:
            raise write_error(error, self.target) from error
        self.discard()

    def discard(self) -> None:
        """Throw away the work, and what a published model has replaced.

        The journal goes first: half of a folder without one is nothing, with one it is work.
        """
        self._journal_path.unlink(missing_ok=True)
        shutil.rmtree(self.partial, ignore_errors=True)

    def _holds(self, shards: tuple[Shard, ...]) -> bool:
        """Whether exactly these shards are there, each with its size and header."""
        weights = self.model.rglob("*.safetensors")
        files = {path.relative_to(self.model).as_posix() for path in weights}
        return files - {FILE} == {shard.file for shard in shards} and all(
            has_header(self.model / shard.file, shard.size, shard.header) for shard in shards
        )

    def _acquire(self) -> None:
        while True:
            fd = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                what, hint = "another merge is writing here", "Wait for it, or choose another OUT."
                raise ResourceError(what, where=str(self.target), hint=hint) from None
            try:
                current = os.stat(self._lock_path).st_ino
            except FileNotFoundError:
                current = -1
            if current == os.fstat(fd).st_ino:
                self._lock = fd
                return
            os.close(fd)  # its owner removed it between our open and our lock


def sync(paths: Iterable[Path]) -> None:
    """Wait until files and folders have reached the disk itself."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
