"""The shards of a merge in its workspace: allocated whole, continued only if they are the same."""

from __future__ import annotations

import shutil

from merge_cli.checkpoint.coefficients import FILE
from merge_cli.checkpoint.layout import Shard
from merge_cli.checkpoint.raw import allocate, has_header, write_error
from merge_cli.engine.journal import Journal
from merge_cli.engine.output import OutputWorkspace


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
    kept = {work.model / shard.file for shard in shards}
    folders = {work.model / shard.folder for shard in shards}
    for path in [*work.model.iterdir(), *(p for f in folders for p in f.iterdir())]:
        if path.is_dir() and path not in folders:
            shutil.rmtree(path)
        elif path.is_file() and path not in kept:
            path.unlink()


def _holds(work: OutputWorkspace, shards: tuple[Shard, ...]) -> bool:
    """Whether exactly these shards are there, each with its size and header."""
    weights = work.model.rglob("*.safetensors")
    files = {path.relative_to(work.model).as_posix() for path in weights}
    return files - {FILE} == {shard.file for shard in shards} and all(
        has_header(work.model / shard.file, shard.size, shard.header) for shard in shards
    )
