"""Downloading one file of the Hub into huggingface_hub's cache; an interrupted download resumes.

    blobs/ETAG.incomplete     what has arrived; the ETag is that of the content, so that only the
                              same file is resumed
    blobs/ETAG                the complete file, checked against its SHA-256 where the ETag is one
    snapshots/COMMIT/NAME     a link to it

huggingface_hub itself starts again after an interruption, since it gives unfinished files new names
each time. Layout and lock are huggingface_hub's: other programs find the file, and wait for it.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from merge_cli.hub.errors import UnreachableError, explained
from merge_cli.system.raw_io import link_or_copy

OnBytes = Callable[[int], None]  # bytes that have arrived; negative if they must be fetched again
_SHA256 = re.compile(r"[0-9a-f]{64}")
_BLOCK = 1 << 20
_NETWORK_BLOCK = 1 << 18  # what is written at once, and lost when the connection breaks
# Names of huggingface_hub's unfinished files, which it never resumes.
_ORPHAN = re.compile(r".+\.[0-9a-f]{8}\.incomplete")
_ABANDONED = 600.0  # seconds


def download(repo_id: str, commit: str, name: str, repository: Path, count: OnBytes) -> None:
    """Download one file of a commit into the cache.

    Args:
        repository: its folder in the cache.
        count: called with the bytes in the cache, and then with what arrives.

    Raises:
        HubError: the file cannot be downloaded.
        ResourceError: the disk is full.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.utils import WeakFileLock

    with explained(repo_id, name):
        url = hf_hub_url(repo_id, name, revision=commit)
        metadata = get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        etag = str(metadata.etag or "")
        if not re.fullmatch(r"\w[\w.-]*", etag):  # it becomes a file's name
            message = "the Hub does not say which file it is"
            raise UnreachableError(message, model=repo_id, file=name)
        blob = repository / "blobs" / etag
        blob.parent.mkdir(parents=True, exist_ok=True)
        lock = repository.parent / ".locks" / repository.name / f"{etag}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(str(lock)):
            _remove_orphans(blob.parent)
            if blob.is_file() and metadata.size in (None, blob.stat().st_size):
                count(blob.stat().st_size)
            else:
                _fetch(url, blob, metadata.size, count, f"{repo_id}, {name}")
            link_or_copy(blob, repository / "snapshots" / commit / name)


def _fetch(url: str, blob: Path, size: int | None, count: OnBytes, label: str) -> None:
    """Download the rest of a file, check it, and give it its name."""
    partial = blob.with_name(f"{blob.name}.incomplete")
    state, received = _resume_state(partial, size)
    count(received)
    if size is None or received < size:
        received, state = _receive(url, partial, received, state, size, count)
    broken = _SHA256.fullmatch(blob.name) and state.hexdigest() != blob.name
    if broken or (size is not None and received != size):
        if broken or received > (size or 0):
            partial.unlink()
            count(-received)
        message = f"arrived damaged: {received} bytes" + (f" of {size}" if size else "")
        raise UnreachableError(message, model=label, hint="Try again.")
    os.replace(partial, blob)


def _resume_state(partial: Path, size: int | None) -> tuple[Any, int]:
    """The hash of what an earlier download has left, and its size."""
    state, received = hashlib.sha256(), 0
    if not partial.is_file():
        return state, received
    if size is None or partial.stat().st_size > size:
        partial.unlink()
        return state, received
    with partial.open("rb") as file:
        while block := file.read(_BLOCK):
            state.update(block)
            received += len(block)
    return state, received


def _receive(
    url: str, partial: Path, received: int, state: Any, size: int | None, count: OnBytes
) -> tuple[int, Any]:
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    if received:
        headers["Range"] = f"bytes={received}-"
    with get_session().stream(
        "GET",
        url,
        headers=headers,
        follow_redirects=True,
        timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
    ) as response:
        hf_raise_for_status(response)
        if received and not _continues(response, received, size):
            count(-received)
            received, state = 0, hashlib.sha256()
        with partial.open("ab" if received else "wb") as file:
            for block in response.iter_bytes(_NETWORK_BLOCK):
                file.write(block)
                state.update(block)
                received += len(block)
                count(len(block))
    return received, state


def _continues(response: Any, received: int, size: int | None) -> bool:
    """Whether the answer is the missing part: a server may send the complete file instead."""
    content_range = response.headers.get("Content-Range", "")
    return (
        response.status_code == 206
        and content_range.startswith(f"bytes {received}-")
        and (size is None or content_range.endswith(f"/{size}"))
    )


def _remove_orphans(blobs: Path) -> None:
    """Remove unfinished files of huggingface_hub that nobody writes to."""
    for path in blobs.glob("*.incomplete"):
        with suppress(OSError):  # another process has removed it, or we may not
            idle = time.time() - path.stat().st_mtime
            if _ORPHAN.fullmatch(path.name) and idle > _ABANDONED:
                path.unlink()
