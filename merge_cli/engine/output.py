"""OUT: made in `OUT.partial/model`, published by one rename, never seen half done.

    OUT.partial/model/        becomes OUT
    OUT.partial/replaced/     the OUT that --overwrite is replacing, between two renames

Merges, conversions and adapters write here, and nothing else publishes a folder. Whatever moment a
process is killed at, the next one finds one of four states: nothing, work to continue, a finished
model between two renames, or a published model with leftovers.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from merge_cli.checkpoint.raw import sync, write_error
from merge_cli.engine.records import Records
from merge_cli.engine.replaceable import refuse_foreign
from merge_cli.engine.workspace import JOURNAL, MARK, Workspace
from merge_cli.errors import ResourceError, UsageError
from merge_cli.sizes import show_size

if TYPE_CHECKING:
    from typing_extensions import Self


class OutputWorkspace(Workspace):
    """The workspace whose `model` becomes OUT.

    Attributes:
        model: where the model is made.
    """

    def __init__(self, target: Path, work: str = "merge") -> None:
        super().__init__(target, ".partial", work)
        self.model = self.path / "model"
        self._replaced = self.path / "replaced"
        self._names = {MARK, JOURNAL, "journal.jsonl.new", "journal.new", "model", "replaced"}
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

    def refuse(self, overwrite: bool, precious: Iterable[Path]) -> None:
        """Raise if OUT is there and may not go.

        Args:
            precious: files and folders that must survive: sources, the recipe. Where we stand and
                the user's home always are.

        Raises:
            UsageError: OUT is a file, holds something precious, exists without --overwrite, is no
                model, or a mount point.
        """
        precious = tuple(precious)
        self._terms = overwrite, precious
        if self.target.exists() and not self.target.is_dir():
            raise UsageError("the output is a file", where=str(self.target))
        self._refuse_mounts()
        self.refuse_strangers()
        for path in (*precious, Path.cwd(), Path(os.path.expanduser("~"))):
            real = Path(os.path.realpath(path))
            taken = (self.target, self.path)
            if real in taken or any(place in real.parents for place in taken):
                raise UsageError(
                    f"the output would replace {real}, which the {self.work} needs",
                    hint="Choose another folder.",
                )
        if not self.target.is_dir() or not any(self.target.iterdir()):
            return
        if not overwrite:
            hint = "Choose another folder, or replace it with --overwrite."
            raise UsageError("the output exists already", where=str(self.target), hint=hint)
        refuse_foreign(self.target)

    def _refuse_mounts(self) -> None:
        if os.path.ismount(self.target):
            what = "the output is a mount point, which no finished model can take the place of"
            hint = f"Choose a folder in it: {self.target / 'merged'}."
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
            inputs: `Inputs.digest`: work over other files, or over files that were exchanged since,
                is begun anew.
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
            what = "what earlier work has left cannot be removed"
            raise ResourceError(what, where=str(self.model), hint="Check who may write there.")
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
