"""OUT.stages: where the results of a recipe's stages wait until OUT is published.

    OUT.stages/NAME        what a document makes, published like any model
    OUT.stages/NAME.begun  the key of the work that makes it, or has begun to
    OUT.stages/NAME.done   the key of the work that has made it

A key says how a result is made: a result with another key is of no use any more.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from merge_cli.recipe.reference import stage_folder
from merge_cli.system.raw_io import replace_file
from merge_cli.system.workspace import MARK, Workspace

if TYPE_CHECKING:
    from typing_extensions import Self

WORK = (".partial", ".training", ".search", ".auto")  # folders of unfinished work beside a result


class StageWorkspace(Workspace):
    """A context manager: locked inside, unlocked (and kept for resuming) outside.

    Attributes:
        begun: whether it was there before.
    """

    def __init__(self, target: Path) -> None:
        super().__init__(target, ".stages", "merge of stages")
        self.begun = self.path.exists()

    def __enter__(self) -> Self:
        """Take the lock, and make the folder.

        Raises:
            UsageError: the folder is somebody else's.
            ResourceError: another process works in it, or the place cannot be written.
        """
        super().__enter__()
        try:
            self.make()
        except BaseException:
            super().__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with suppress(OSError):  # gone already
            if [path.name for path in self.path.iterdir()] == [MARK]:
                self.discard()
        super().__exit__(kind, error, trace)

    def path_of(self, name: str) -> Path:
        """Where the result of a stage lies, or will."""
        return self.path / stage_folder(name)

    def has(self, name: str, key: str) -> bool:
        """Whether the result of a stage is there, made by the work of this key."""
        done = self._done(name)
        return self.path_of(name).is_dir() and done.is_file() and done.read_bytes() == key.encode()

    def begin(self, name: str, key: str) -> None:
        """Note what is about to be worked at; what other work has left of the stage goes.

        Raises:
            ResourceError: it cannot be written.
        """
        folder = self.path_of(name)
        begun = folder.with_name(f"{folder.name}.begun")
        if not begun.is_file() or begun.read_bytes() != key.encode():
            for suffix in WORK:
                shutil.rmtree(folder.with_name(folder.name + suffix), ignore_errors=True)
            replace_file(begun, key.encode())

    def finished(self, name: str, key: str) -> None:
        """Note that the result of a stage is there.

        Raises:
            ResourceError: it cannot be written.
        """
        replace_file(self._done(name), key.encode())

    def clear(self) -> None:
        """Remove everything that stages have made or begun."""
        self.tidy(())

    def tidy(self, stages: Collection[str]) -> None:
        """Remove everything but the results that are named."""
        names = {MARK}.union(*({self.path_of(n).name, self._done(n).name} for n in stages))
        for path in self.path.iterdir():
            if path.name in names:
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def _done(self, name: str) -> Path:
        return self.path / f"{stage_folder(name)}.done"
