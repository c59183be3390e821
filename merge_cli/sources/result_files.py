"""Files that a command writes besides its models: none may replace what the command reads.

A page, a table, a recipe: the user names the file, and may name one that the same command is given
to read, directly, by a link, or as a file in a model's folder. All of it is known from paths alone,
and is looked at before any work.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from merge_cli.checkpoint.auxiliary_files import CARD
from merge_cli.checkpoint.fingerprint import decides, folder_fingerprints
from merge_cli.errors import UsageError
from merge_cli.sources.source import Source

_HINT = "Name another file."


def check_writable(results: Mapping[str, Path | None]) -> None:
    """Refuse what cannot be written as a file, and two results in one file.

    Args:
        results: option -> the file that it names; None where it is not given.

    Raises:
        UsageError: a folder, a file in a folder that does not exist, or a file named twice.
    """
    named: dict[str, str] = {}
    for option, path in _given(results):
        if path.is_dir():
            raise UsageError(f"is a folder; {option} names a file", where=str(path))
        if not path.absolute().parent.is_dir():
            raise UsageError("no such folder", where=str(path.parent))
        if _is_device(path):
            continue
        first = named.setdefault(os.path.realpath(path), option)
        if first != option:
            raise UsageError(f"{first} and {option} name one file", where=str(path), hint=_HINT)


def refuse_replacing(
    results: Mapping[str, Path | None],
    sources: Iterable[Source] = (),
    files: Iterable[Path] = (),
    *,
    overwrite: bool = False,
) -> None:
    """Refuse results that would replace what a command reads.

    Beside a model's files a new one may be written, if it has not the name of a model's.

    Args:
        results: option -> the file that it names; None where it is not given.
        sources: the opened models.
        files: what else is read: recipes, data, evaluation files. None of them need exist.
        overwrite: the user wants files replaced: also those in a model's folder that are not read.

    Raises:
        UsageError: names the option and the file.
    """
    given = [(option, path) for option, path in _given(results) if not _is_device(path)]
    if not given:
        return
    models = list(sources)
    read = [*files, *(file for source in models for file in _files_of(source))]
    folders = [folder for source in models for folder in _folders_of(source)]
    for option, path in given:
        for file in read:
            if is_same_file(path, file):
                message = f"{option} would replace a file that this command reads"
                raise UsageError(message, where=str(path), hint=_HINT)
        real = Path(os.path.realpath(path))
        for folder in folders:
            if folder not in real.parents:
                continue
            if real.exists() and not overwrite:
                message = f"{option} would replace a file in the folder of a model that is read"
                raise UsageError(message, where=str(path), hint=_HINT)
            if decides(real.name):
                message = f"{option} would write a file that belongs to a model that is read"
                raise UsageError(message, where=str(path), hint=_HINT)


def _given(results: Mapping[str, Path | None]) -> Iterator[tuple[str, Path]]:
    for option, path in results.items():
        if path is not None:
            yield option, path


def _is_device(path: Path) -> bool:
    """Whether it is a pipe or a device, as /dev/stdout is: nothing in it is replaced."""
    return path.exists() and not path.is_file() and not path.is_dir()


def _files_of(source: Source) -> Iterator[Path]:
    """What is read of a model and of its adapter, as far as it is on disk."""
    yield from (source.root / name for name in source.header_bytes)
    adapter = (source.adapter.root,) if source.adapter is not None else ()
    for folder in (source.root, *adapter):
        yield from folder_fingerprints(folder)
        yield folder / CARD


def _folders_of(source: Source) -> Iterator[Path]:
    """The folders that are a model and its adapter, links resolved; of a file none."""
    if not source.file:
        yield Path(os.path.realpath(source.root))
    if source.adapter is not None:
        yield Path(os.path.realpath(source.adapter.root))


def is_same_file(path: Path, other: Path) -> bool:
    """Whether two paths are one file: by links of either kind, too."""
    try:
        return os.path.samefile(path, other)
    except OSError:  # one of them does not exist
        return os.path.realpath(path) == os.path.realpath(other)
