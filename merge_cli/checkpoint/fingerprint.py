"""Fingerprints of files and folders: has this file changed, and are two files the same?

FileFingerprint      size, times and number: tells every ordinary write and exchange, for free
sampled_fingerprint  SHA-256 over size and samples: tells writes that keep the times (files
                     unpacked with their old ones, other layers of a container), and models
                     apart; no proof against a forger
file_fingerprint     SHA-256 over every byte, where a result is remembered by it
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from merge_cli.checkpoint.auxiliary_files import is_companion
from merge_cli.checkpoint.components import PIPELINE

_FOLDERS = (PIPELINE, "modules.json")  # files that name folders of the model
_TEMPLATES = "additional_chat_templates"
_DECIDING = ("config.json", "adapter_config.json", PIPELINE)


class FileFingerprint(NamedTuple):
    """A file's size, times in nanoseconds, and number."""

    size: int
    modified: int
    changed: int
    inode: int


def fingerprint_of(path: Path) -> FileFingerprint:
    """A file as it is now, links followed.

    Raises:
        OSError: it cannot be looked at.
    """
    about = os.stat(path)
    return FileFingerprint(about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino)


def folder_fingerprints(root: Path) -> dict[Path, FileFingerprint]:
    """The files of a model's folder that decide what is made of it, as they are now."""
    result = {}
    for path in _files(root):
        try:
            result[path] = fingerprint_of(path)
        except OSError:  # gone meanwhile, or a link to nowhere: whoever needs it will say so
            continue
    return result


def sampled_digest(path: Path) -> str:
    """SHA-256 over size and samples: the whole content of a file of up to 256 KiB.

    Raises:
        OSError: it cannot be read.
    """
    state = hashlib.sha256(str(path.stat().st_size).encode())
    add_samples(state, path)
    return state.hexdigest()


def add_samples(state: hashlib._Hash, path: Path, places: int = 64, length: int = 4096) -> None:
    """Add 64 places of a file, evenly spaced, beginning and end among them."""
    size = path.stat().st_size
    with path.open("rb", buffering=0) as file:
        for i in range(places):
            file.seek(max(0, size - length) * i // (places - 1))
            state.update(file.read(length))


def _files(root: Path) -> Iterator[Path]:
    try:
        top = sorted(root.iterdir())
        inner = [path for path in top if path.is_dir()] if _has_folders(root) else []
        templates = root / _TEMPLATES
        inner += [templates] if templates.is_dir() and templates not in inner else []
        nested = [path for folder in inner for path in sorted(folder.iterdir())]
    except OSError:
        return
    yield from (path for path in (*top, *nested) if _decides(path.name) and path.is_file())


def _has_folders(root: Path) -> bool:
    return any((root / name).is_file() for name in _FOLDERS)


def _decides(name: str) -> bool:
    ends = name.endswith((".safetensors", ".index.json", ".py"))
    return ends or name in _DECIDING or is_companion(name)
