"""A model in an object store or on a web server: what is there, headers by range, downloads.

    CACHE/remote/models--NAME/
        blobs/KEY               a file; the key is of its name, size and version
        blobs/KEY.incomplete    what has arrived of it
        snapshots/VERSION/NAME  a link to it, as in the Hub's cache

The version of a file is its ETag, else its time. It is asked for before a file is read and again
when it is there: a file that has changed meanwhile is refused. A plan needs the list of files, the
small ones and headers; the rest follows when the merge begins.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO, cast

from merge_cli.checkpoint.headers import read_raw_header
from merge_cli.errors import RemoteError
from merge_cli.remote.filesystem import (
    WEB,
    AbsentError,
    DeniedError,
    UnreachableError,
    changed,
    explained,
    open_filesystem,
    protocol_of,
)
from merge_cli.remote.listing import ASKED, asked, listed, looked_at, with_retries
from merge_cli.system.caches import cache_folder
from merge_cli.system.range_file import BLOCK, RangeFile
from merge_cli.system.raw_io import link_or_copy, write_error

_BLOCK = 16 * 2**20  # what is written at once, and lost when the connection breaks


@dataclass(frozen=True)
class RemoteModel:
    """The files of a folder at an address, each in one version.

    Attributes:
        repo_id: the folder's address.
        files: name -> size in bytes.
        versions: name -> what tells this version of it from another.
        commit: of all of them together.
    """

    repo_id: str
    files: Mapping[str, int]
    versions: Mapping[str, str]
    note: str = ""
    system: Any = field(default=None, repr=False, compare=False)

    @cached_property
    def commit(self) -> str:
        listed = sorted((name, size, self.versions[name]) for name, size in self.files.items())
        return hashlib.sha256(repr(listed).encode()).hexdigest()[:40]

    @property
    def folder(self) -> Path:
        """Where its files are, or will be."""
        return self._cache / "snapshots" / self.commit

    def is_cached(self, name: str) -> bool:
        """Whether this version of a file is on this machine."""
        path = self.folder / name
        return path.is_file() and path.stat().st_size == self.files[name]

    def fetch(self, names: Sequence[str], progress: Callable[[int], None] | None = None) -> Path:
        """Download files that are not here yet; what an earlier download has left is continued.

        Args:
            progress: called with the number of bytes as they arrive (cached files: all at once).

        Returns:
            the folder that holds them.

        Raises:
            RemoteError: a file that is missing, has changed, or cannot be downloaded.
            ResourceError: the cache cannot be written.
        """
        count = progress or (lambda size: None)
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            if name not in self.files:
                raise RemoteError("no such file there (404)", model=self.repo_id, file=name)
            if self.is_cached(name):
                count(self.files[name])
                continue
            try:
                self._download(name, count)
            except OSError as error:
                raise write_error(error, self._cache) from error
        return self.folder

    def open(self, name: str, block: int = BLOCK) -> BinaryIO:
        """A file, of which what is read is fetched, in blocks of so many bytes."""
        if self.is_cached(name):
            return (self.folder / name).open("rb")
        return cast(BinaryIO, RangeFile(self.files[name], partial(self._range, name), block))

    def read_header(self, name: str) -> bytes:
        """The raw safetensors header of a file: the 8-byte length and the JSON.

        Raises:
            RemoteError: the file cannot be read.
            CorruptFileError: it does not begin with a header.
        """
        size = self.files[name]
        if size > _BLOCK and protocol_of(self.repo_id) in WEB and not self.is_cached(name):
            self._range(name, size - 1, size)  # a server without ranges is told now, not later
        with self.open(name) as file:
            return read_raw_header(file, name, self.repo_id)

    @property
    def _cache(self) -> Path:
        name = re.sub(r"[^A-Za-z0-9.]+", "-", self.repo_id).strip("-")[-60:]
        key = hashlib.sha256(self.repo_id.encode()).hexdigest()[:12]
        return cache_folder() / "remote" / f"models--{name}-{key}"

    def _download(self, name: str, count: Callable[[int], None]) -> None:
        size, version = self.files[name], self.versions[name]
        key = hashlib.sha256(repr((name, size, version)).encode()).hexdigest()
        blob = self._cache / "blobs" / key
        partial = blob.with_name(f"{key}.incomplete")
        blob.parent.mkdir(parents=True, exist_ok=True)
        with _locked(blob.with_name(f"{key}.lock")):
            if not blob.is_file():
                received = partial.stat().st_size if partial.is_file() else 0
                if received > size:
                    partial.unlink()
                    received = 0
                self._refuse_changed(name, partial)
                count(received)
                with partial.open("ab") as file:
                    while received < size:
                        block = self._range(name, received, min(received + _BLOCK, size))
                        file.write(block)
                        received += len(block)
                        count(len(block))
                self._refuse_changed(name, partial)
                os.replace(partial, blob)
            else:
                count(size)
            link_or_copy(blob, self.folder / name)

    def _range(self, name: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a file.

        Raises:
            RemoteError: they cannot be had.
        """

        def ask() -> bytes:
            with explained(self.repo_id, name):
                path = f"{self.repo_id}/{name}"
                with self.system.open(path, "rb", cache_type="none") as file:
                    if not file.seekable():
                        raise ValueError("no range of it can be read")
                    file.seek(start)
                    data = bytes(file.read(stop - start))
            if len(data) != stop - start:
                message = f"{len(data)} bytes have arrived instead of {stop - start}"
                raise UnreachableError(message, model=self.repo_id, file=name, hint="Try again.")
            return data

        return with_retries(ask)

    def _refuse_changed(self, name: str, partial: Path) -> None:
        """Raise if a file is of another version now; what is here of it is of no use then.

        Raises:
            RemoteError: it is.
        """
        now = with_retries(lambda: looked_at(self.system, self.repo_id, name))
        if now != (self.files[name], self.versions[name]):
            partial.unlink(missing_ok=True)
            raise changed(self.repo_id, name)


def open_remote(address: str) -> RemoteModel:
    """Look at a folder: its files, with their sizes and versions.

    Raises:
        RemoteError: missing, not allowed, not reachable, or of no version that could be checked.
        ResourceError: a package that is not installed.
    """
    address = address.rstrip("/")
    system = open_filesystem(address)
    listing = asked(system, address) if protocol_of(address) in WEB else listed(system, address)
    if not listing:
        message = "nothing is there (404)"
        if protocol_of(address) in WEB:
            message = f"none of {', '.join(ASKED[:3])} is there (404)"
        raise AbsentError(message, model=address, hint="Check the address.")
    files = {name: size for name, (size, _) in listing.items()}
    versions = {name: version for name, (_, version) in listing.items()}
    return RemoteModel(address, files, versions, system=system)


def open_remote_file(address: str) -> tuple[RemoteModel, str]:
    """Look at a file, and at the config and tokenizer beside it, if there is a config.

    Returns:
        the folder with these files, and the file's name.

    Raises:
        as `open_remote` does.
    """
    folder, _, name = address.rpartition("/")
    system = open_filesystem(address)
    listing = {name: with_retries(lambda: looked_at(system, folder, name))}
    try:
        listing["config.json"] = with_retries(lambda: looked_at(system, folder, "config.json"))
    except (AbsentError, DeniedError):
        pass
    else:
        whole = open_remote(folder)
        listing |= {n: (size, whole.versions[n]) for n, size in whole.files.items()}
    files = {name: size for name, (size, _) in listing.items()}
    versions = {name: version for name, (_, version) in listing.items()}
    return RemoteModel(folder, files, versions, system=system), name


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; the file stays."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
