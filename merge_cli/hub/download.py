"""One file of the Hub into huggingface_hub's cache, from where an earlier download stopped.

    blobs/ETAG.incomplete     what has arrived; named by its content, so that only the same file
                              is ever continued
    blobs/ETAG                the whole file, held against its SHA-256 where the ETag is one
    snapshots/COMMIT/NAME     a link to it

huggingface_hub begins again after an interruption since it gives unfinished files new names each
time. The layout is its own, and so is the lock: other programs find the file, and wait for it.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from merge_cli.hub.errors import UnreachableError, explained

Count = Callable[[int], None]  # bytes that have arrived; fewer than none if they were worthless
_SHA256 = re.compile(r"[0-9a-f]{64}")
_BLOCK = 1 << 20
_WRITTEN = 1 << 18  # at once; what a broken connection costs
# Names that huggingface_hub gives and never continues; left behind where it was killed.
_ORPHAN = re.compile(r".+\.[0-9a-f]{8}\.incomplete")
_ABANDONED = 600.0  # seconds


def download(repo_id: str, commit: str, name: str, repository: Path, count: Count) -> None:
    """Bring one file of a commit into the cache.

    Args:
        repository: its folder in the cache.
        count: told what is here already, and then what arrives.

    Raises:
        HubError: the file cannot be had.
        ResourceError: the disk is full.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.utils import WeakFileLock

    with explained(repo_id, name):
        url = hf_hub_url(repo_id, name, revision=commit)
        about = get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        etag = str(about.etag or "")
        if not re.fullmatch(r"\w[\w.-]*", etag):  # it becomes a file's name
            message = "the Hub does not say which file it is"
            raise UnreachableError(message, model=repo_id, file=name)
        blob = repository / "blobs" / etag
        blob.parent.mkdir(parents=True, exist_ok=True)
        lock = repository.parent / ".locks" / repository.name / f"{etag}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(str(lock)):
            _remove_orphans(blob.parent)
            if blob.is_file() and about.size in (None, blob.stat().st_size):
                count(blob.stat().st_size)
            else:
                _fetch(url, blob, about.size, count, f"{repo_id}, {name}")
            _link(blob, repository / "snapshots" / commit / name)


def _fetch(url: str, blob: Path, size: int | None, count: Count, label: str) -> None:
    """The rest of a file, and the whole of it under its name."""
    partial = blob.with_name(f"{blob.name}.incomplete")
    state, here = _begun(partial, size)
    count(here)
    if size is None or here < size:
        here, state = _receive(url, partial, here, state, size, count)
    broken = _SHA256.fullmatch(blob.name) and state.hexdigest() != blob.name
    if broken or (size is not None and here != size):
        if broken or here > (size or 0):
            partial.unlink()
            count(-here)
        message = f"arrived damaged: {here} bytes" + (f" of {size}" if size else "")
        raise UnreachableError(message, model=label, hint="Try again.")
    os.replace(partial, blob)


def _begun(partial: Path, size: int | None) -> tuple[Any, int]:
    """The hash of what is here, and how much that is."""
    state, here = hashlib.sha256(), 0
    if not partial.is_file():
        return state, here
    if size is None or partial.stat().st_size > size:
        partial.unlink()
        return state, here
    with partial.open("rb") as file:
        while block := file.read(_BLOCK):
            state.update(block)
            here += len(block)
    return state, here


def _receive(
    url: str, partial: Path, here: int, state: Any, size: int | None, count: Count
) -> tuple[int, Any]:
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    if here:
        headers["Range"] = f"bytes={here}-"
    with get_session().stream(
        "GET",
        url,
        headers=headers,
        follow_redirects=True,
        timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
    ) as response:
        hf_raise_for_status(response)
        if here and not _continues(response, here, size):
            count(-here)
            here, state = 0, hashlib.sha256()
        with partial.open("ab" if here else "wb") as file:
            for block in response.iter_bytes(_WRITTEN):
                file.write(block)
                state.update(block)
                here += len(block)
                count(len(block))
    return here, state


def _continues(response: Any, here: int, size: int | None) -> bool:
    """Whether what comes is what is missing: a server may send the whole file instead."""
    said = response.headers.get("Content-Range", "")
    return (
        response.status_code == 206
        and said.startswith(f"bytes {here}-")
        and (size is None or said.endswith(f"/{size}"))
    )


def _link(blob: Path, pointer: Path) -> None:
    """The name in the snapshot; a copy where the file system has no links."""
    if pointer.exists() and pointer.stat().st_size == blob.stat().st_size:
        return
    pointer.parent.mkdir(parents=True, exist_ok=True)
    pointer.unlink(missing_ok=True)  # a link to nothing, or a copy that was cut
    try:
        pointer.symlink_to(os.path.relpath(blob, pointer.parent))
    except OSError:
        new = pointer.with_name(f"{pointer.name}.{os.getpid()}.new")
        shutil.copyfile(blob, new)
        os.replace(new, pointer)


def _remove_orphans(blobs: Path) -> None:
    """Unfinished files that nobody writes to and nobody will continue."""
    for path in blobs.glob("*.incomplete"):
        with suppress(OSError):  # somebody else was quicker, or it is not ours to remove
            idle = time.time() - path.stat().st_mtime
            if _ORPHAN.fullmatch(path.name) and idle > _ABANDONED:
                path.unlink()
