"""What a repository is to those who read models: files elsewhere, in one version."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

from merge_cli.system.range_file import BLOCK


class Repository(Protocol):
    """Files elsewhere, in one version: `HubModel`, `RemoteModel`.

    Attributes:
        repo_id: its name on the Hub, or its address.
        commit: the version.
        files: name -> size in bytes.
        folder: where its files are, or will be.
        note: for the plan; often empty.
    """

    @property
    def repo_id(self) -> str: ...
    @property
    def commit(self) -> str: ...
    @property
    def files(self) -> Mapping[str, int]: ...
    @property
    def folder(self) -> Path: ...
    @property
    def note(self) -> str: ...

    def is_cached(self, name: str) -> bool:
        """Whether a file is on this machine."""

    def fetch(self, names: Sequence[str], progress: Callable[[int], None] | None = None) -> Path:
        """Download files that are not; returns the folder that holds them."""

    def read_header(self, name: str) -> bytes:
        """The raw header of a file of safetensors."""

    def open(self, name: str, block: int = BLOCK) -> BinaryIO:
        """A file, of which what is read is fetched, in blocks of so many bytes."""
