"""Fingerprints of files and folders: has this file changed, and are two files the same?

    FileFingerprint        size, times and number of a file: free, and tells every ordinary write
    sampled_fingerprint    SHA-256 over size and samples: tells writes that keep the times, too
                           (files unpacked with their old ones, other layers of a container)
    file_fingerprint       SHA-256 over every byte
    model_fingerprint      the same over all files that decide what a model says; remembered
    auxiliary_fingerprint  the same over tokenizer, template and generation files

A sample is no proof against a forger. What is found again in a cache is known by every byte.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from merge_cli.checkpoint.auxiliary_files import companion_files, is_companion
from merge_cli.checkpoint.components import PIPELINE
from merge_cli.system.caches import cache_folder, write_cached
from merge_cli.system.machine import usable_cores
from merge_cli.system.paths import require_names
from merge_cli.system.records import read_sealed, seal

_FOLDERS = (PIPELINE, "modules.json")  # files that name folders of the model
_SETTLED = 2.0  # seconds: a younger file may change within the clock's resolution
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
    status = os.stat(path)
    return FileFingerprint(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


def folder_fingerprints(root: Path) -> dict[Path, FileFingerprint]:
    """The files of a model's folder that decide what is made of it, as they are now.

    Raises:
        SourceError: a file whose name is not text.
    """
    files, result = [*_files(root)], {}
    require_names((path.name for path in files), str(root))
    for path in files:
        try:
            result[path] = fingerprint_of(path)
        except OSError:  # gone meanwhile, or a link to nowhere: whoever needs it will say so
            continue
    return result


def sampled_fingerprint(path: Path) -> str:
    """SHA-256 over size and samples: the whole content of a file of up to 256 KiB.

    Raises:
        OSError: it cannot be read.
    """
    state = hashlib.sha256(str(path.stat().st_size).encode())
    add_samples(state, path)
    return state.hexdigest()


def add_samples(state: hashlib._Hash, path: Path, samples: int = 64, length: int = 4096) -> None:
    """Add 64 places of a file, evenly spaced, beginning and end among them."""
    size = path.stat().st_size
    with path.open("rb", buffering=0) as file:
        for i in range(samples):
            file.seek(max(0, size - length) * i // (samples - 1))
            state.update(file.read(length))


def file_fingerprint(path: Path, stop: threading.Event | None = None) -> str:
    """SHA-256 of a file.

    Args:
        stop: for a thread, which Ctrl-C does not reach: once it is set, what is returned is
            worthless.
    """
    state, block = hashlib.sha256(), bytearray(1 << 20)
    with path.open("rb", buffering=0) as file:
        while (size := file.readinto(block)) and not (stop and stop.is_set()):
            state.update(memoryview(block)[:size])
    return state.hexdigest()


def model_fingerprint(root: Path) -> str:
    """SHA-256 over names and contents of a model folder's weights, config and tokenizer files.

    Documentation and reports do not count: they change no prediction.

    Raises:
        OSError: a file cannot be read.
    """
    from concurrent.futures import ThreadPoolExecutor  # plans never get here

    files = _model_files(root)
    stop = threading.Event()
    pool = ThreadPoolExecutor(max_workers=min(4, usable_cores()))
    try:
        fingerprints = list(pool.map(lambda path: _remembered_or_read(path, stop), files))
    finally:
        stop.set()  # Ctrl-C, or a file that cannot be read: nobody waits for the others
        pool.shutdown(cancel_futures=True)
    return _joined(files, fingerprints)


def cached_fingerprint(root: Path) -> str | None:
    """`model_fingerprint`, if it is known without reading weights; else None.

    Raises:
        OSError: a file cannot be read.
    """
    files = _model_files(root)
    fingerprints = [
        _remembered(path) if path.suffix == ".safetensors" else file_fingerprint(path)
        for path in files
    ]
    cached = [fingerprint for fingerprint in fingerprints if fingerprint is not None]
    return _joined(files, cached) if len(cached) == len(files) else None


def auxiliary_fingerprint(root: Path) -> str:
    """SHA-256 over a model folder's tokenizer, template and generation files."""
    state = hashlib.sha256()
    for path in companion_files(root):
        state.update(f"{path.name}\0{file_fingerprint(path)}\n".encode())
    return state.hexdigest()


def _files(root: Path) -> Iterator[Path]:
    try:
        top = sorted(root.iterdir())
        inner = [path for path in top if path.is_dir()] if _has_folders(root) else []
        templates = root / _TEMPLATES
        inner += [templates] if templates.is_dir() and templates not in inner else []
        nested = [path for folder in inner for path in sorted(folder.iterdir())]
    except OSError:
        return
    yield from (path for path in (*top, *nested) if decides(path.name) and path.is_file())


def _has_folders(root: Path) -> bool:
    return any((root / name).is_file() for name in _FOLDERS)


def decides(name: str) -> bool:
    """Whether a file of that name in a model's folder decides what is made of the model."""
    ends = name.endswith((".safetensors", ".index.json", ".py"))
    return ends or name in _DECIDING or is_companion(name)


def _counts(name: str) -> bool:
    return is_companion(name) or name == "config.json" or name.endswith(".safetensors.index.json")


def _model_files(root: Path) -> list[Path]:
    """What decides what a model says."""
    return sorted(
        path
        for path in root.iterdir()
        if path.is_file() and (path.suffix == ".safetensors" or _counts(path.name))
    )


def _joined(files: list[Path], fingerprints: list[str]) -> str:
    state = hashlib.sha256()
    for path, fingerprint in zip(files, fingerprints, strict=True):
        state.update(f"{path.name}\0{fingerprint}\n".encode())
    return state.hexdigest()


def _remembered(path: Path) -> str | None:
    """A file's fingerprint from the cache, if nothing about the file has changed."""
    cached = (read_sealed(_cache_path(path)) or {}).get("sha256")
    return cached if isinstance(cached, str) else None


def _remembered_or_read(path: Path, stop: threading.Event) -> str:
    """A file's fingerprint, remembered or made."""
    cached = _remembered(path)
    if cached is not None:
        return cached
    status, cache_path = path.stat(), _cache_path(path)
    fingerprint = file_fingerprint(path, stop)
    newest = max(status.st_mtime, status.st_ctime)
    if _now() - newest > _SETTLED and not stop.is_set():
        write_cached(cache_path, seal({"sha256": fingerprint}))
    return fingerprint


def _cache_path(path: Path) -> Path:
    """Where a file's digest is remembered: by all that changes when the file does."""
    status = path.stat()
    times = f"{status.st_mtime_ns}\0{status.st_ctime_ns}"
    identity = f"\0{status.st_size}\0{times}\0{status.st_ino}".encode()
    # A link may lead to a name that is not text.
    fingerprint = hashlib.sha256(os.fsencode(path.resolve()) + identity)
    return cache_folder() / "digests" / fingerprint.hexdigest()


def _now() -> float:
    return time.time()
