"""OUT: worked on in `OUT.partial/`, published by one rename, never seen half done."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from merge_cli.checkpoint.layout import Shard
from merge_cli.checkpoint.raw import FilePool, allocate, write_error
from merge_cli.errors import ResourceError, UsageError


class OutputFolder:
    """Where a merge is made and where it goes.

    Attributes:
        target: the folder that the user asked for.
        partial: the folder worked in: `journal.jsonl` and `model/`, which becomes `target`.
    """

    def __init__(self, target: Path) -> None:
        self.target = target.absolute()
        self.partial = self.target.with_name(self.target.name + ".partial")
        self.model = self.partial / "model"
        self._old = self.partial / "replaced"

    def refuse_existing(self, overwrite: bool) -> None:
        """Raise if something is there that the user did not say may go.

        Raises:
            UsageError: the target exists and is not an empty folder.
            ResourceError: it cannot be written.
        """
        if self.target.exists() and not self.target.is_dir():
            raise UsageError("the output is a file", where=str(self.target))
        if self.target.is_dir() and any(self.target.iterdir()) and not overwrite:
            hint = "Choose another folder, or replace it with --overwrite."
            raise UsageError("the output exists already", where=str(self.target), hint=hint)
        parent = self.target.parent
        while not parent.exists():
            parent = parent.parent
        if not os.access(parent, os.W_OK):
            raise ResourceError("the folder cannot be written", where=str(parent))

    def check_space(self, needed: int) -> None:
        """Raise if the disk has no room for what is not there yet.

        Raises:
            ResourceError: names what is needed and what is free.
        """
        place = self.target.parent
        while not place.exists():
            place = place.parent
        present = sum(f.stat().st_blocks * 512 for f in self.model.glob("*.safetensors"))
        free = shutil.disk_usage(place).free
        if needed - present > free:
            what = f"the disk is too full: {_gb(needed - present)} needed, {_gb(free)} free"
            raise ResourceError(what, where=str(place))

    def discard(self) -> None:
        """Throw away everything that was worked on."""
        shutil.rmtree(self.partial, ignore_errors=True)

    def allocate(self, shards: tuple[Shard, ...]) -> bool:
        """Create the shards that are missing or of another size.

        Returns:
            whether all of them were there already, so that a journal can be believed.
        """
        self.model.mkdir(parents=True, exist_ok=True)
        complete = True
        for shard in shards:
            path = self.model / shard.file
            if not path.exists() or path.stat().st_size != shard.size:
                allocate(path, shard.size, shard.header)
                complete = False
        return complete

    def publish(self, overwrite: bool) -> None:
        """Make the finished model the target.

        With `overwrite` the old folder moves aside first; killed in between, the same command
        finds the finished model and publishes it.

        Raises:
            UsageError: something appeared at the target meanwhile.
            ResourceError: the rename failed.
        """
        try:
            if overwrite and self.target.exists() and any(self.target.iterdir()):
                shutil.rmtree(self._old, ignore_errors=True)
                os.rename(self.target, self._old)
            self.refuse_existing(overwrite=False)
            os.rename(self.model, self.target)
        except OSError as error:
            raise write_error(error, self.target) from error
        self.discard()


def sync_files(files: list[Path]) -> None:
    """Wait until the files' bytes have reached the disk itself."""
    pool = FilePool(os.O_RDONLY)
    try:
        for file in files:
            os.fsync(pool.fd(file))
    except OSError as error:
        raise write_error(error, files[0]) from error
    finally:
        pool.close()


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
