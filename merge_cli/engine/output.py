"""OUT: made in `OUT.partial/model`, published by one rename, never seen half done.

    OUT.partial/model/        becomes OUT
    OUT.partial/replaced/     the OUT that --overwrite is replacing, between two renames
    OUT.partial/nodes/        what each node of a cluster has finished

Merges, conversions and adapters write here, and nothing else publishes a folder. Whenever a process
is killed, the next one finds one of four states: nothing, work to continue, a finished model
between two renames, or a published model with leftovers.

--overwrite replaces a folder that is a model, an adapter or a pipeline, and holds nothing else: a
file or a folder that models do not have is somebody's work.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from merge_cli.checkpoint.auxiliary_files import is_weight
from merge_cli.checkpoint.coefficients import FILE
from merge_cli.checkpoint.layout import Shard
from merge_cli.engine.journal import Journal
from merge_cli.engine.model_folder import refuse_foreign
from merge_cli.errors import ResourceError, UsageError
from merge_cli.system.machine import show_size
from merge_cli.system.raw_io import allocate, has_header, sync, write_error
from merge_cli.system.records import Records
from merge_cli.system.workspace import JOURNAL, MARK, Workspace

if TYPE_CHECKING:
    from typing_extensions import Self

NODES = "nodes"  # the folder of the journals of a cluster's nodes


class OutputWorkspace(Workspace):
    """The workspace whose `model` becomes OUT.

    Attributes:
        model: where the model is made.
    """

    def __init__(self, target: Path, work: str = "merge") -> None:
        super().__init__(target, ".partial", work)
        self.model = self.path / "model"
        self._replaced = self.path / "replaced"
        self._names = {
            MARK,
            JOURNAL,
            "journal.jsonl.new",
            "journal.new",
            "model",
            "replaced",
            NODES,
        }
        self._terms: tuple[bool, tuple[Path, ...]] = (False, ())  # on which OUT may be replaced

    def __enter__(self) -> Self:
        """Take the lock, and put back what a killed --overwrite had moved aside.

        Raises:
            as `Workspace` does; UsageError, too, where OUT cannot be renamed.
        """
        self._refuse_mounts()
        super().__enter__()
        try:
            if self._replaced.is_dir() and not self.target.exists():
                os.rename(self._replaced, self.target)
        except OSError as error:
            self.__exit__(None, None, None)
            raise write_error(error, self.target) from error
        return self

    def _is_ours(self) -> bool:
        return super()._is_ours() and {p.name for p in self.path.iterdir()} <= self._names

    def refuse(self, overwrite: bool, protected_paths: Iterable[Path]) -> None:
        """Raise if OUT is there and may not go.

        Args:
            protected_paths: files and folders that must survive: sources, the recipe. The working
                directory and the user's home always do.

        Raises:
            UsageError: OUT is a file, holds something protected, exists without --overwrite, is no
                model, or a mount point.
        """
        protected_paths = tuple(protected_paths)
        self._terms = overwrite, protected_paths
        if self.target.exists() and not self.target.is_dir():
            raise UsageError("the output is a file", where=str(self.target))
        if is_weight(self.target.name):
            message = "the output is a folder, and this is the name of a file"
            hint = f"Name a folder: {self.target.with_suffix('').name}."
            raise UsageError(message, where=str(self.target), hint=hint)
        self._refuse_mounts()
        self.refuse_strangers()
        self.refuse_holding((*protected_paths, Path.cwd(), Path(os.path.expanduser("~"))))
        if not self.target.is_dir() or not any(self.target.iterdir()):
            return
        if not overwrite:
            hint = "Choose another folder, or replace it with --overwrite."
            raise UsageError("the output exists already", where=str(self.target), hint=hint)
        refuse_foreign(self.target)

    def refuse_holding(self, protected_paths: Iterable[Path]) -> None:
        """Raise if OUT, or the folder of unfinished work, is or holds one of these.

        Raises:
            UsageError: names the first.
        """
        for path in protected_paths:
            resolved = Path(os.path.realpath(path))
            taken = (self.target, self.path)
            if resolved in taken or any(folder in resolved.parents for folder in taken):
                raise UsageError(
                    f"the output would replace {resolved}, which the {self.work} needs",
                    hint="Choose another folder.",
                )

    def _refuse_mounts(self) -> None:
        if os.path.ismount(self.target):
            message = "the output is a mount point, which no finished model can take the place of"
            hint = f"Choose a folder in it: {self.target / 'merged'}."
            raise UsageError(message, where=str(self.target), hint=hint)

    def check_space(self, needed: int) -> None:
        """Raise if the disk has no room for what is not there yet.

        Raises:
            ResourceError: names what is needed and what is free.
        """
        present = sum(f.stat().st_blocks * 512 for f in self.model.rglob("*.safetensors"))
        folder = self.target.parent
        while not folder.exists():  # a dry run creates no folders
            folder = folder.parent
        free = shutil.disk_usage(folder).free
        if needed - present > free:
            message = f"the disk is too full: {show_size(needed - present)} needed, "
            raise ResourceError(message + f"{show_size(free)} free", where=str(self.target.parent))

    def published(self, key: str) -> bool:
        """Whether OUT is the result of this very work, by a process killed while tidying up.

        OUT itself says so, in its report: nothing that is left of the work would prove it.
        """
        report = self.target / "merge_report.json"
        if not self.path.exists() or not report.is_file():
            return False
        try:
            return bool(json.loads(report.read_text(encoding="utf-8")).get("work") == key)
        except (ValueError, AttributeError):
            return False  # somebody else's file

    def refuse_other_work(self, key: str) -> None:
        """Raise rather than throw away what other work on the same OUT has done.

        A journal whose first line is torn is of no work that could be finished.

        Raises:
            UsageError: the journal has finished parts of other work.
        """
        if Records.key_of(self.journal) in (None, key) or not self.model.exists():
            return
        if Records.count_of(self.journal):
            raise self.other_work()

    def begin(self, key: str, inputs: str = "", whole: Callable[[], bool] = lambda: True) -> bool:
        """Continue earlier work if it is this work over these inputs, and whole.

        Args:
            inputs: `Inputs.fingerprint`: work over other files, or over files that were exchanged
                since, starts over.
            whole: whether what the journal tells of is there.

        Returns:
            whether there is something to continue. Otherwise `model` is there, and empty, and the
            journal is the caller's to begin, last.

        Raises:
            ResourceError: the folder cannot be written.
        """
        if Records.is_of(self.journal, key, inputs) and self.model.is_dir() and whole():
            return True
        self.discard()
        if os.path.lexists(self.model):
            message = "what earlier work has left cannot be removed"
            raise ResourceError(message, where=str(self.model), hint="Check who may write there.")
        self.make()
        try:
            self.model.mkdir()
        except OSError as error:
            raise write_error(error, self.path) from error
        return False

    def publish(self, *, fsync: bool = False) -> None:
        """Make the finished model OUT; an OUT that may be replaced moves aside first.

        Raises:
            UsageError: OUT may not be replaced: somebody has made or filled it meanwhile.
            ResourceError: a rename failed.
        """
        self.refuse(*self._terms)
        try:
            if fsync:
                sync([*(p for p in self.model.rglob("*")), self.model, self.path])
            if self.target.is_dir() and any(self.target.iterdir()):
                os.rename(self.target, self._replaced)
            os.rename(self.model, self.target)
            if fsync:
                sync([self.target.parent])
        except OSError as error:
            raise write_error(error, self.target) from error
        self.discard()


def open_journal(
    work: OutputWorkspace, key: str, shards: tuple[Shard, ...], inputs: str = ""
) -> Journal:
    """Continue earlier work if it is this work and whole; otherwise start over.

    Raises:
        ResourceError: the folder cannot be written, or the disk is full.
    """
    if not work.begin(key, inputs, lambda: _holds(work, shards)):
        try:
            for folder in {shard.folder for shard in shards} - {""}:
                (work.model / folder).mkdir()
        except OSError as error:
            raise write_error(error, work.path) from error
        for shard in shards:
            allocate(work.model / shard.file, shard.size, shard.header)
    # The journal comes last: where there is one, every shard has its size and its header.
    return Journal(work.journal, key, inputs)


def clear_companions(work: OutputWorkspace, shards: tuple[Shard, ...]) -> None:
    """Remove what an earlier run, perhaps with other flags, has put beside the shards."""
    shard_files = {work.model / shard.file for shard in shards}
    folders = {work.model / shard.folder for shard in shards}
    for path in [*work.model.iterdir(), *(p for f in folders for p in f.iterdir())]:
        if path.is_dir() and path not in folders:
            shutil.rmtree(path)
        elif path.is_file() and path not in shard_files:
            path.unlink()


def _holds(work: OutputWorkspace, shards: tuple[Shard, ...]) -> bool:
    """Whether exactly these shards are there, each with its size and header."""
    folders = {work.model / shard.folder for shard in shards}
    # What a result brings besides (statistics, where learning began) lies in folders of its own.
    weights = (path for folder in folders for path in folder.glob("*.safetensors"))
    files = {path.relative_to(work.model).as_posix() for path in weights}
    return files - {FILE} == {shard.file for shard in shards} and all(
        has_header(work.model / shard.file, shard.size, shard.header) for shard in shards
    )
