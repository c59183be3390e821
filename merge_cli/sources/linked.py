"""Folders in the cache for models that are one file: a link to it, and what was made of it.

    CACHE/KIND/KEY/NAME -> the file

A folder is known by the file's path, size, times and number, and made again when it is gone.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from merge_cli.checkpoint.fingerprint import fingerprint_of
from merge_cli.errors import CorruptFileError
from merge_cli.formats.storage_format import DecodedModel
from merge_cli.system.caches import cache_folder
from merge_cli.system.raw_io import unfinished_file, write_error

_FORMAT = 2


@dataclass(frozen=True)
class FileModel:
    """A model that is one file, opened.

    Attributes:
        root: the folder that the file is read from.
        name: of the file, relative to it.
        header: its first bytes; none of a pickle.
    """

    root: Path
    name: str
    decoded: DecodedModel
    header: bytes
    notes: tuple[str, ...]


def linked_folder(kind: str, path: Path, label: str) -> Path:
    """A folder of its own for a file, with a link to it.

    Raises:
        CorruptFileError: the file cannot be looked at.
        ResourceError: the cache cannot be written.
    """
    try:
        state = fingerprint_of(path)
    except OSError as error:
        message = f"cannot be read: {error.strerror}"
        raise CorruptFileError(message, model=label, file=path.name) from error
    real = Path(os.path.realpath(path))
    return link_folder(kind, path.name, real, (str(real), tuple(state)))


def link_folder(kind: str, name: str, target: Path, identity: object) -> Path:
    """A folder of its own for what `identity` says, with a link to a file.

    Args:
        name: of the link, relative to the folder.
        target: the file, which need not be there yet.

    Raises:
        ResourceError: the cache cannot be written.
    """
    text = repr((_FORMAT, version("merge-cli"), identity))
    root = cache_folder() / kind / hashlib.sha256(text.encode()).hexdigest()[:32]
    link = root / name
    try:
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            with suppress(FileExistsError):  # of another process, just now
                link.symlink_to(target)
    except OSError as error:
        raise write_error(error, root) from error
    return root


def write_files(root: Path, files: Mapping[str, str]) -> None:
    """Write texts into a folder, as far as they are not there already.

    Raises:
        ResourceError: the cache cannot be written.
    """
    try:
        for name, text in files.items():
            content = text.encode()
            if not (root / name).is_file() or (root / name).read_bytes() != content:
                with unfinished_file(root / name) as new:
                    new.write_bytes(content)
    except OSError as error:
        raise write_error(error, root) from error
