"""A model that has been opened: its config, its tensors, and where its files are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_cli.checkpoint.components import (
    PIPELINE,
    module_folders,
    names_in,
    part_folders,
    stem_of,
)
from merge_cli.checkpoint.config import is_of_5
from merge_cli.checkpoint.fingerprint import FileFingerprint, add_samples
from merge_cli.checkpoint.headers import TensorRef
from merge_cli.checkpoint.repository import Repository
from merge_cli.checkpoint.tensors import Tensor
from merge_cli.errors import CorruptFileError, SourceError
from merge_cli.hub import models as hub
from merge_cli.lora.adapter import WEIGHTS, Adapter
from merge_cli.sources.single_file import (
    SAFETENSORS,
)
from merge_cli.system.shell import command

if TYPE_CHECKING:
    from merge_cli.remote.models import RemoteModel


@dataclass(frozen=True)
class Source:
    """An opened model.

    Attributes:
        label: the model as the recipe names it.
        root: the folder of its files; a Hub model's shards may not be in it yet.
        tensors: by name.
        header_bytes: file name -> raw header, for digests.
        hub: the repository of the Hub that it comes from; None for others.
        remote: the folder at an address that it comes from; None for others.
        notes: what a reader of the plan should know.
        planned: whether it is still to be made, by a document of the same recipe.
        adapter: what `tensors` have been updated with; None for a model as it is.
        fingerprints: its files as they were before they were read; none of a model on the Hub.
        quantization, left_out: of a quantised model, see `DecodedModel`.
        file: the name of the one file in `root` that it is; empty where it is the folder.
    """

    label: str
    root: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    header_bytes: Mapping[str, bytes] = field(repr=False)
    hub: hub.HubModel | None = None
    notes: tuple[str, ...] = ()
    planned: bool = False
    adapter: Adapter | None = None
    fingerprints: Mapping[Path, FileFingerprint] = field(default_factory=dict, repr=False)
    quantization: Mapping[str, Any] = field(default_factory=dict, repr=False)
    left_out: tuple[TensorRef, ...] = field(default=(), repr=False)
    file: str = ""
    remote: RemoteModel | None = None

    @property
    def repository(self) -> Repository | None:
        """Where its files are fetched from; None for those on disk."""
        return self.hub or self.remote

    def ties(self, head: str) -> bool:
        """Whether the head is the input embedding: as the config says, here or in its text part.

        A config that is silent leaves it to the model class, which no one here knows: then a head
        that is stored is a head of its own. So it is where transformers 5 has written the config:
        it loads a stored head whatever the config says, and stores none that is the embedding.
        (Of T5's family it says that all are tied, those with heads of their own, too.)
        """
        stored = head in self.tensors
        for config in (self.config, self.config.get("text_config")):
            if isinstance(config, dict) and "tie_word_embeddings" in config:
                return bool(config["tie_word_embeddings"]) and not (stored and is_of_5(self.config))
        return not stored

    @property
    def is_safetensors(self) -> bool:
        """Whether its weights are in files that transformers loads from its folder."""
        return not self.file and all(name.endswith(SAFETENSORS) for name in self.header_bytes)

    @property
    def is_lone_file(self) -> bool:
        """Whether it is one file of weights without a config: so is then what is made of it."""
        return bool(self.file) and not self.config

    @property
    def stems(self) -> dict[str, str]:
        """For each folder with weights ("" for the model's own) what the files are called."""
        if self.is_lone_file:
            return {"": Path(self.file).stem}
        names = [*self.header_bytes, *([PIPELINE] if (self.root / PIPELINE).is_file() else [])]
        parts = part_folders(names, module_folders(self.root, self.label))
        return {folder: stem_of(names_in(folder, names)) for folder in parts}

    def fingerprint(self, shards: Iterable[str] | None = None) -> str:
        """SHA-256 over config, headers, and samples of the weights: tells models apart.

        Sampling (64 places in each file) makes it free, and enough to notice another fine-tune or
        another revision; it is no proof against a forger.

        Args:
            shards: the files that matter, which must be there; default all. An adapter's always do.

        Raises:
            CorruptFileError: a file that cannot be read.
        """
        state = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for name in sorted(self.header_bytes if shards is None else shards):
            self._add_file(state, self.root / name, self.header_bytes[name])
        if self.adapter is not None:
            state.update(json.dumps(self.adapter.config, sort_keys=True).encode())
            self._add_file(state, self.adapter.root / WEIGHTS, self.adapter.header)
        return state.hexdigest()

    def _add_file(self, state: hashlib._Hash, path: Path, header: bytes) -> None:
        state.update(path.name.encode() + b"\0" + header)
        try:
            add_samples(state, path)
        except OSError as error:
            message = f"cannot be read: {error.strerror}"
            raise CorruptFileError(message, model=self.label, file=path.name) from error

    @property
    def identity(self) -> tuple[Path, ...]:
        """What tells models apart: where the files are, and those of the adapter."""
        adapter = (self.adapter.root.resolve(),) if self.adapter else ()
        return ((self.root / self.file).resolve(), *adapter)

    def download_size(self, shards: Iterable[str]) -> int:
        """Bytes of these files, and of an adapter, as far as they are not on disk."""
        repository, adapter = self.repository, self.adapter.repository if self.adapter else None
        size = sum(repository.files.get(name, 0) for name in shards) if repository else 0
        return size + (adapter.files.get(WEIGHTS, 0) if adapter else 0)

    @property
    def commits(self) -> dict[str, str]:
        """The commits that it, and its adapter, were resolved to, by how the recipe names them."""
        model, _, adapter = self.label.partition("+") if self.adapter else (self.label, "", "")
        commits = {model: self.hub} if self.hub else {}
        if self.adapter and self.adapter.hub:
            commits[adapter or model] = self.adapter.hub  # or an adapter by itself
        return {name: item.commit for name, item in commits.items() if item.commit}

    @property
    def revision(self) -> str | None:
        """The commit that a Hub model was resolved to."""
        return self.hub.commit if self.hub else None


def require_safetensors(source: Source) -> None:
    """What runs a model loads its folder with transformers.

    Raises:
        SourceError: its weights are in a GGUF file or a distributed checkpoint.
    """
    if not source.is_safetensors:
        message = "its weights are read while merging, and here the model is run"
        hint = f"Convert it first: {command('convert', source.label, 'OUT')}, and name OUT."
        raise SourceError(message, model=source.label, hint=hint)


def fetch_weights(
    source: Source, files: Iterable[str], progress: Callable[[int], None] | None = None
) -> None:
    """Bring the named shards of a model that is elsewhere, and its adapter, into their folders.

    Local models have theirs.
    """
    if source.repository is not None:
        source.repository.fetch(sorted(files), progress)
    if source.adapter is not None and source.adapter.repository is not None:
        source.adapter.repository.fetch([WEIGHTS], progress)
