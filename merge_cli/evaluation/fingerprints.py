"""A model's identity by content: SHA-256 of all that decides what it says.

Unlike a merge's fingerprint, which samples, this reads every byte: an evaluation reads them anyway,
and a result that is found in the cache must be the result of exactly this model. What was read
once is remembered with the file's size, times and number, as git does it.
"""

from __future__ import annotations

import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from merge_cli.checkpoint.auxiliary_files import companion_files, is_companion
from merge_cli.errors import SourceError
from merge_cli.evaluation.cache import cache_folder, write_atomically
from merge_cli.evaluation.task import file_fingerprint
from merge_cli.sources.source import Source
from merge_cli.system.machine import usable_cores
from merge_cli.system.records import read_sealed, seal

_SETTLED = 2.0  # seconds: a younger file may change within the clock's resolution


def model_fingerprint(root: Path) -> str:
    """SHA-256 over names and contents of a model folder's weights, config and tokenizer files.

    Documentation and reports do not count: they change no prediction.

    Raises:
        OSError: a file cannot be read.
    """
    files = _files(root)
    stop = threading.Event()
    pool = ThreadPoolExecutor(max_workers=min(4, usable_cores()))
    try:
        digests = list(pool.map(lambda path: _digest(path, stop), files))
    finally:
        stop.set()  # Ctrl-C, or a file that cannot be read: nobody waits for the others
        pool.shutdown(cancel_futures=True)
    return _joined(files, digests)


def cached_fingerprint(root: Path) -> str | None:
    """`model_digest`, if it is known without reading weights; else None.

    Raises:
        OSError: a file cannot be read.
    """
    files = _files(root)
    digests = [
        _remembered(path) if path.suffix == ".safetensors" else file_fingerprint(path)
        for path in files
    ]
    known = [digest for digest in digests if digest is not None]
    return _joined(files, known) if len(known) == len(files) else None


def source_fingerprint(source: Source) -> str:
    """`model_digest` of an opened source that is a model by itself.

    Raises:
        SourceError: it has an adapter, and its folder is that of the model without it.
        OSError: a file cannot be read.
    """
    refuse_adapter(source)
    return model_fingerprint(source.root)


def source_identity(source: Source) -> str:
    """`source_digest`, or for a model of the Hub its commit: its weights need not be here yet.

    Raises:
        as `source_digest` does.
    """
    refuse_adapter(source)
    if source.hub is not None and source.hub.commit:
        return f"{source.hub.repo_id}@{source.hub.commit}"
    return source_fingerprint(source)


def remembered_identity(source: Source) -> str | None:
    """`source_identity`, if it is known without reading weights; else None.

    For plans, which read headers alone. What is not remembered has never been run here, or was
    written a moment ago, so that no cache knows it either.

    Raises:
        as `source_digest` does.
    """
    refuse_adapter(source)
    if source.hub is not None and source.hub.commit:
        return source_identity(source)
    return cached_fingerprint(source.root)


def refuse_changed(source: Source, identity: str) -> None:
    """Raise if a model that has just been loaded is not the one that was looked at before.

    What is found with it would be remembered under the other one's name.

    Args:
        identity: `source_digest` of before. A model of the Hub is what its commit says.

    Raises:
        SourceError: it has been written to meanwhile.
    """
    if source.hub is None and source_fingerprint(source) != identity:
        hint = "Run the command again when nothing writes to it."
        raise SourceError("has changed while it was loaded", model=source.label, hint=hint)


def refuse_adapter(source: Source) -> None:
    """What runs a model from its folder must not run it without the adapter that is named.

    Raises:
        SourceError: there is one.
    """
    if source.adapter is not None:
        message = "an adapter is applied while merging, and here the model is run"
        hint = "Merge the two into a folder first: `merge_method: passthrough`, one model."
        raise SourceError(message, model=source.label, hint=hint)


def auxiliary_fingerprint(root: Path) -> str:
    """SHA-256 over a model folder's tokenizer, template and generation files."""
    state = hashlib.sha256()
    for path in companion_files(root):
        state.update(f"{path.name}\0{file_fingerprint(path)}\n".encode())
    return state.hexdigest()


def _counts(name: str) -> bool:
    return is_companion(name) or name == "config.json" or name.endswith(".safetensors.index.json")


def _files(root: Path) -> list[Path]:
    """What decides what a model says."""
    return sorted(
        path
        for path in root.iterdir()
        if path.is_file() and (path.suffix == ".safetensors" or _counts(path.name))
    )


def _joined(files: list[Path], digests: list[str]) -> str:
    state = hashlib.sha256()
    for path, digest in zip(files, digests, strict=True):
        state.update(f"{path.name}\0{digest}\n".encode())
    return state.hexdigest()


def _remembered(path: Path) -> str | None:
    """A file's digest from the cache, if nothing about the file has changed."""
    cached = (read_sealed(_place(path)) or {}).get("sha256")
    return cached if isinstance(cached, str) else None


def _digest(path: Path, stop: threading.Event) -> str:
    """A file's digest, remembered or made."""
    result = _remembered(path)
    if result is not None:
        return result
    about, place = path.stat(), _place(path)
    digest = file_fingerprint(path, stop)
    newest = max(about.st_mtime, about.st_ctime)
    if _now() - newest > _SETTLED and not stop.is_set():
        write_atomically(place, seal({"sha256": digest}))
    return digest


def _place(path: Path) -> Path:
    """Where a file's digest is remembered: by all that changes when the file does."""
    about = path.stat()
    times = f"{about.st_mtime_ns}\0{about.st_ctime_ns}"
    stamp = f"{path.resolve()}\0{about.st_size}\0{times}\0{about.st_ino}"
    return cache_folder() / "digests" / hashlib.sha256(stamp.encode()).hexdigest()


def _now() -> float:
    import time

    return time.time()
