"""Models on the Hugging Face Hub: which commit, which files, and how they get here.

A revision becomes a commit once, in `open_hub`; every later request names that commit, so all
files of a model belong together. Files live in huggingface_hub's own cache. What they mean is for
others to say.

Weights come by plain HTTP into `blobs/<sha256>.incomplete`, where the next run goes on:
huggingface_hub 2 throws away the part it has when a download fails, by HTTP as by Xet.
"""

from __future__ import annotations

import errno
import hashlib
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

from merge_cli.errors import CorruptFileError, HubError, MergeCliError, ResourceError

T = TypeVar("T")
FIRST_READ = 32 * 1024  # holds the whole header of most shards: one request instead of two
LARGEST_HEADER = 100_000_000  # the limit of safetensors itself
SMALL = 1 << 20  # below this, nothing is worth resuming
PAUSES = (0.5, 2.0)  # seconds before each further attempt
WORKERS = 4  # files at a time: one connection seldom fills the line


@dataclass(frozen=True)
class HubModel:
    """One commit of a repository: files with sizes in bytes, and a `note` that a plan can show.

    Without a connection, `files` holds what the cache holds of that commit.
    """

    repo_id: str
    revision: str | None
    commit: str
    files: Mapping[str, int]
    note: str = ""

    @property
    def label(self) -> str:
        """The model as a recipe names it."""
        return f"{self.repo_id}@{self.revision}" if self.revision else self.repo_id


def open_hub(repo_id: str, revision: str | None = None) -> HubModel:
    """Resolve a branch, tag, or short or full commit to a commit, and list its files.

    Raises:
        HubError: the repository or revision is not there for this user, or the Hub is out of
            reach (or HF_HUB_OFFLINE is set) and the cache does not hold the revision either.
    """
    from huggingface_hub import HfApi, constants

    def ask() -> HubModel:
        patience = constants.HF_HUB_ETAG_TIMEOUT
        info = HfApi().model_info(
            repo_id, revision=revision, files_metadata=True, timeout=patience
        )
        sizes = {s.rfilename: s.size or 0 for s in info.siblings or ()}
        return HubModel(repo_id, revision, str(info.sha), sizes)

    with _explained(HubModel(repo_id, revision, "", {})):
        try:
            return _retrying(ask)
        except Exception as error:
            if _out_of_reach(error) and (cached := _from_cache(repo_id, revision)):
                return cached
            raise


def fetch_files(
    model: HubModel, names: Sequence[str], progress: Callable[[int], None] | None = None
) -> Path:
    """Bring these files of the commit into the cache; returns the snapshot that holds them.

    `progress` is called with bytes as they arrive, one call at a time but from several threads,
    for files that are not cached yet; what an earlier run left counts at once, and the sum is the
    size of those files (a server that cannot resume takes its part back with a negative number).

    Raises:
        HubError: no such file, no access, no connection, or a download that broke off.
        ResourceError: the cache cannot be written.
    """
    for name in names:
        _must_list(model, name)
    stop, lock = threading.Event(), threading.Lock()

    def count(size: int) -> None:
        with lock:
            if stop.is_set():
                raise InterruptedError("another file failed, or the user pressed Ctrl-C")
            if progress and size:
                progress(size)

    missing = [name for name in dict.fromkeys(names) if not is_cached(model, name)]
    with ThreadPoolExecutor(WORKERS) as pool:
        try:
            list(pool.map(lambda name: _fetch(model, name, count), missing))
        except BaseException:
            stop.set()  # leaving the pool waits for its threads: let them end at the next chunk
            raise
    _remember(model)
    return _storage(model.repo_id) / "snapshots" / model.commit


def read_header(model: HubModel, name: str) -> bytes:
    """The header of one safetensors file: 8 bytes of little-endian length, then the JSON.

    Raises:
        HubError: as for `fetch_files`.
        CorruptFileError: the file is too short for the header that it announces.
    """
    _must_list(model, name)
    size = model.files[name]

    def read(start: int, stop: int) -> bytes:
        if not is_cached(model, name):
            return _retrying(lambda: _read_range(model, name, start, stop)) if start < stop else b""
        with (_storage(model.repo_id) / "snapshots" / model.commit / name).open("rb") as file:
            file.seek(start)
            return file.read(stop - start)

    with _explained(model, name):
        head = read(0, min(FIRST_READ, size))
        end = 8 + int.from_bytes(head[:8], "little")
        if len(head) < 8 or end > min(size, 8 + LARGEST_HEADER):
            what = f"not a safetensors file: {size} bytes, and a header that would end at {end}"
            hint = "the file in the repository is damaged or of another kind"
            raise CorruptFileError(what, model=model.label, file=name, hint=hint)
        return head[:end] if end <= len(head) else head + read(len(head), end)


def is_cached(model: HubModel, name: str) -> bool:
    """Whether this file of this commit is in the cache, whole."""
    from huggingface_hub import try_to_load_from_cache

    if name not in model.files:  # names may come from an index: only listed ones become paths
        return False
    return isinstance(try_to_load_from_cache(model.repo_id, name, revision=model.commit), str)


def _storage(repo_id: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser() / f"models--{repo_id.replace('/', '--')}"


def _from_cache(repo_id: str, revision: str | None) -> HubModel | None:
    """The commit that the cache knows by this name, if at least one of its files is here."""
    root, wanted = _storage(repo_id), revision or "main"
    ref, commits = root / "refs" / wanted, list[str]()
    if ref.is_file():
        commits = [ref.read_text().strip()]
    elif re.fullmatch(r"[0-9a-f]{7,40}", wanted):
        commits = [path.name for path in (root / "snapshots").glob(f"{wanted}*")]
    if len(commits) != 1 or not re.fullmatch(r"[0-9a-f]{40}", commits[0]):
        return None
    home = root / "snapshots" / commits[0]
    here = {p.relative_to(home).as_posix(): p.stat().st_size for p in home.rglob("*") if p.is_file()}
    from huggingface_hub import is_offline_mode

    reason = "HF_HUB_OFFLINE is set" if is_offline_mode() else "the Hub is out of reach"
    note = f"{reason}: using the cached commit {commits[0][:8]}, which may not be the latest"
    return HubModel(repo_id, revision, commits[0], here, note) if here else None


def _remember(model: HubModel) -> None:
    """Let the cache know the revision by name, so that it is found without a connection."""
    if re.fullmatch(r"[0-9a-f]{40}", model.revision or ""):
        return
    ref = _storage(model.repo_id) / "refs" / (model.revision or "main")
    with suppress(OSError):  # a shared cache may be read-only, which is no reason to fail
        ref.parent.mkdir(parents=True, exist_ok=True)
        part = ref.with_name(f"{ref.name}.{threading.get_native_id()}.tmp")
        part.write_text(model.commit)
        part.replace(ref)
