"""Loading models from the Hugging Face Hub: a commit, its small files, headers, weights.

A plan needs kilobytes: the list of files, the small ones, and the headers of the shards, which are
read by HTTP range. A merge then downloads the shards that it reads. Every request after the first
names the commit, so that all files are of one revision. huggingface_hub handles tokens.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar, cast

from merge_cli.errors import CorruptFileError, HubError
from merge_cli.hub.download import download
from merge_cli.hub.errors import UnreachableError, explained
from merge_cli.system.range_file import BLOCK, RangeFile

_FIRST_BYTES = 32_768  # holds the whole header of most shards
_ATTEMPTS = 3  # in a row that bring nothing
_PAUSE = 0.5  # seconds; longer with every attempt
_LONGEST_WAIT = 60.0  # seconds that a busy Hub may make us wait at once
T = TypeVar("T")


@dataclass(frozen=True)
class HubModel:
    """A repository at one commit.

    Attributes:
        revision: the branch, tag or commit that was requested.
        commit: the commit that it is, 40 hexadecimal digits.
        files: name -> size in bytes; only of cached files where the Hub was not asked.
        note: for the plan, where the files come from the cache; often empty.
    """

    repo_id: str
    revision: str | None
    commit: str
    files: Mapping[str, int]
    note: str = ""

    @property
    def folder(self) -> Path:
        """Where its files are, or will be."""
        return _snapshot(self)

    def is_cached(self, name: str) -> bool:
        """Whether a file of this commit is on this machine already."""
        return is_cached(self, name)

    def fetch(self, names: Sequence[str], progress: Callable[[int], None] | None = None) -> Path:
        """`fetch_files`."""
        return fetch_files(self, names, progress)

    def read_header(self, name: str) -> bytes:
        """`read_header`."""
        return read_header(self, name)

    def open(self, name: str, block: int = BLOCK) -> BinaryIO:
        """A file, of which what is read is fetched, in blocks of so many bytes."""
        cached = _cached(self, name)
        if cached is not None:
            return cached.open("rb")

        def fetch(start: int, stop: int) -> bytes:
            return _range(self, name, start, stop)

        return cast(BinaryIO, RangeFile(self.files.get(name, 0), fetch, block))


def open_hub(repo_id: str, revision: str | None = None) -> HubModel:
    """Find a repository and resolve the revision to a commit, with one request.

    Without a connection (or with HF_HUB_OFFLINE=1) the cache is used, if it has the model.

    Raises:
        HubError: missing or private, gated, no such revision, no connection and no cached copy.
    """
    from huggingface_hub import HfApi, ModelInfo, constants

    label = f"{repo_id}@{revision}" if revision else repo_id
    if constants.HF_HUB_OFFLINE:
        return _from_cache(repo_id, revision, "offline: from the cache")

    def ask() -> ModelInfo:
        with explained(label):
            return HfApi().model_info(
                repo_id,
                revision=revision,
                files_metadata=True,
                timeout=constants.HF_HUB_ETAG_TIMEOUT,
            )

    try:
        info = ask()
    except UnreachableError as error:
        try:
            return _from_cache(repo_id, revision, f"{error.why}: from the cache")
        except HubError:
            if not 0 < error.wait <= _LONGEST_WAIT:
                raise error from None
        _sleep(error.wait)
        info = _with_retries(ask)
    files = {file.rfilename: int(file.size or 0) for file in info.siblings or []}
    assert info.sha is not None, "the Hub always names the commit"
    return HubModel(repo_id, revision, info.sha, files)


def fetch_files(
    model: HubModel, names: Sequence[str], progress: Callable[[int], None] | None = None
) -> Path:
    """Download files of the commit that are not in the cache yet.

    A broken connection is tried again. What has arrived is kept in any case, and the next call
    resumes there.

    Args:
        progress: called with the number of bytes as they arrive (cached files: all at once).

    Returns:
        the snapshot folder that holds them.

    Raises:
        HubError: a file that is missing or cannot be downloaded.
    """
    folder = _snapshot(model)
    for name in names:
        if is_cached(model, name):
            if progress:
                progress((folder / name).stat().st_size)
            continue
        _download(model, name, progress or (lambda count: None))
    _remember_revision(model)
    return folder


def _download(model: HubModel, name: str, progress: Callable[[int], None]) -> None:
    """Download a file, again and again for as long as attempts bring more of it."""
    most_arrived = tries = 0
    while True:
        arrived = 0

        def count(size: int) -> None:
            nonlocal arrived
            arrived += size
            progress(size)

        try:
            return download(model.repo_id, model.commit, name, _repository(model.repo_id), count)
        except UnreachableError as error:
            progress(-arrived)  # the next try counts what is here
            tries = 1 if arrived > most_arrived else tries + 1
            most_arrived = max(most_arrived, arrived)
            if tries >= _ATTEMPTS or error.wait > _LONGEST_WAIT:
                raise
            _sleep(error.wait or _PAUSE * tries)


def _sleep(seconds: float) -> None:
    time.sleep(seconds)


def _with_retries(action: Callable[[], T]) -> T:
    """Try an action again soon, unless the Hub asks to wait too long.

    Raises:
        HubError: as the action does.
    """
    for tries in range(1, _ATTEMPTS):
        try:
            return action()
        except UnreachableError as error:
            if error.wait > _LONGEST_WAIT:
                raise
            _sleep(error.wait or _PAUSE * tries)
    return action()


def read_header(model: HubModel, name: str) -> bytes:
    """The raw safetensors header of a shard: the 8-byte length and the JSON, never the weights.

    Raises:
        HubError: the file cannot be downloaded.
        CorruptFileError: it does not begin with a header.
    """
    cached = _cached(model, name)
    if cached is not None:
        with cached.open("rb") as file:
            start = file.read(8)
            return start + file.read(_header_length(start, model, name))
    size = model.files.get(name, 0)
    if size < 8:
        message = f"not a safetensors file: {size} bytes long"
        raise CorruptFileError(message, model=model.repo_id, file=name)
    start = _range(model, name, 0, min(_FIRST_BYTES, size))
    total = 8 + _header_length(start[:8], model, name)
    if len(start) < total:
        start += _range(model, name, len(start), total)
    return start[:total]


def is_cached(model: HubModel, name: str) -> bool:
    """Whether a file of this commit is on this machine already."""
    return _cached(model, name) is not None


def _from_cache(repo_id: str, revision: str | None, note: str) -> HubModel:
    """The repository as the cache has it.

    Raises:
        HubError: the cache has no such revision.
    """
    from huggingface_hub import constants

    root = _repository(repo_id)
    branch = revision or constants.DEFAULT_REVISION
    reference = root / "refs" / branch
    commit = reference.read_text().strip() if reference.is_file() else branch
    snapshots = root / "snapshots"
    every = sorted(snapshots.iterdir()) if snapshots.is_dir() else []
    folders = [folder for folder in every if folder.name.startswith(commit)]
    if len(folders) != 1:
        label = f"{repo_id}@{revision}" if revision else repo_id
        message = "no such folder, not in the cache, and offline mode is on"
        flag = f" --revision {revision}" if revision else ""
        hint = f"Download it while online: hf download {repo_id}{flag}."
        raise HubError(message, model=label, hint=hint)
    files = {
        path.relative_to(folders[0]).as_posix(): path.stat().st_size
        for path in folders[0].rglob("*")
        if path.is_file()
    }
    return HubModel(repo_id, revision, folders[0].name, files, note)


def _remember_revision(model: HubModel) -> None:
    """Write the branch's commit into the cache, for later work without a connection."""
    from huggingface_hub import constants

    revision = model.revision or constants.DEFAULT_REVISION
    if not model.commit.startswith(revision):
        reference = _repository(model.repo_id) / "refs" / revision
        if reference.is_file() and reference.read_text().strip() == model.commit:
            return
        # Only a convenience: a shared cache may be read-only.
        with suppress(OSError):
            reference.parent.mkdir(parents=True, exist_ok=True)
            reference.write_text(model.commit)


def _repository(repo_id: str) -> Path:
    """The cache's folder of a repository, with `refs/` and `snapshots/` in it."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    name: str = repo_folder_name(repo_id=repo_id, repo_type="model")
    return Path(constants.HF_HUB_CACHE) / name


def _snapshot(model: HubModel) -> Path:
    return _repository(model.repo_id) / "snapshots" / model.commit


def _cached(model: HubModel, name: str) -> Path | None:
    """A cached file, if it has the size on the Hub: a full disk may have cut it."""
    path = _snapshot(model) / name
    if not path.is_file():
        return None
    size = model.files.get(name, 0)
    return path if not size or path.stat().st_size == size else None


def _header_length(start: bytes, model: HubModel, name: str) -> int:
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 2**63
    if length > 100_000_000:  # the format's own limit
        message = "not a safetensors file: it does not start with a header"
        raise CorruptFileError(message, model=model.repo_id, file=name)
    return int(length)


def _range(model: HubModel, name: str, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of a file, or fewer at its end."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    def ask() -> bytes:
        with explained(model.repo_id, name):
            url = hf_hub_url(model.repo_id, name, revision=model.commit)
            headers = {**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}"}
            response = get_session().get(url, headers=headers, follow_redirects=True, timeout=30)
            hf_raise_for_status(response)
            return bytes(response.content)[: stop - start]

    return _with_retries(ask)
