"""Opening a model from its headers: a folder, a file, a repository of the Hub, or an address.

It reads kilobytes: config.json, the index, the headers of the shards. For a model on the Hub or at
an address only those are fetched; the shards follow in `fetch_weights`, and only those that the
merge needs. Nothing here executes anything from a checkpoint.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from merge_cli.checkpoint.components import (
    names_in,
    part_folders,
)
from merge_cli.checkpoint.fingerprint import folder_fingerprints
from merge_cli.checkpoint.repository import Repository
from merge_cli.errors import CorruptFileError, HubError, SourceError
from merge_cli.formats.dcp.metadata import METADATA
from merge_cli.formats.dcp.model import is_checkpoint, open_checkpoint
from merge_cli.formats.dcp.names import MEGATRON, NAMES, Rule, parse_rules, renamed
from merge_cli.formats.dcp.storage import OpenFile
from merge_cli.formats.detect import read_as_numbers
from merge_cli.hub import models as hub
from merge_cli.lora.adapter import Adapter, open_adapter
from merge_cli.lora.application import apply_adapter
from merge_cli.lora.config import base_note
from merge_cli.lora.heads import changed_config
from merge_cli.recipe.reference import (
    HUB,
    ModelRef,
    expanded,
    hub_file,
    hub_id,
    is_address,
    is_revision,
    local_folder,
)
from merge_cli.remote.models import RemoteModel, open_remote, open_remote_file
from merge_cli.sources.gguf import SUFFIX as GGUF
from merge_cli.sources.linked import FileModel
from merge_cli.sources.single_file import (
    CONFIG,
    NO_CONFIG,
    SAFETENSORS,
    is_all_weights,
    is_weights,
    is_whole_folder,
    open_file,
    open_stored_file,
)
from merge_cli.sources.source import Source
from merge_cli.sources.storage import (
    INDEX,
    LocalFolder,
    ModelStorage,
    StoredElsewhere,
    read_headers,
    read_index,
)
from merge_cli.system.untrusted import Unreadable, read_mapping, read_text
from merge_cli.system.untrusted_yaml import read_front

_PART_BLOCK = 2**14  # bytes that are fetched of a part elsewhere, at least


def open_source(model: ModelRef, folder: Path) -> Source:
    """Find a model and read its headers.

    Args:
        folder: where relative paths start: the recipe's folder.

    Raises:
        SourceError: missing, not a model, pickled weights only.
        CorruptFileError: an index or header that does not hold.
        HubError: a repository that cannot be had.
    """
    label = str(model)
    if model.lora:
        base = open_source(ModelRef(model.path, model.revision), folder)
        return _with_adapter(
            base, open_adapter(model.lora, model.lora_revision, folder, label), label
        )
    path = local_folder(model.path, folder)
    if path is not None:
        if model.revision:
            message = f"a folder on disk has no revision '{model.revision}'"
            raise SourceError(message, model=label, hint="Remove the part after '@'.")
        return _open_folder(path, label)
    if is_address(model.path):
        return _open_address(model.path, label)
    repository, name = hub_file(model.path) or (hub_id(model.path), "")
    if repository is None and model.path.startswith(HUB):
        message = "not a name that the Hub has"
        raise HubError(message, model=label, hint=f"Write {HUB}organisation/name[@revision].")
    if repository is None:
        raise SourceError("no such folder", model=label, hint=_looked_for(model.path, folder))
    if model.revision and not is_revision(model.revision):
        message = f"'{model.revision[:60]}' is not the name of a branch, a tag or a commit"
        raise HubError(message, model=label, hint="Check the part after '@'.")
    try:
        return _open_repository(hub.open_hub(repository, model.revision), name, label)
    except HubError as error:
        near = _neighbour(model.path, folder)
        if not near:
            raise
        # It reads like a Hub id, and much more like a folder that is here.
        raise HubError(error.message, model=label, hint=f"Did you mean '{near}'?") from error


def _open_address(address: str, label: str) -> Source:
    if is_weights(address):
        return _open_repository(*open_remote_file(address), label)
    return _open_repository(open_remote(address), "", label)


def open_tokenizer(model: ModelRef, folder: Path) -> Source:
    """A model of which the tokenizer files are wanted alone: it may have no weights.

    Raises:
        SourceError: no such folder, or one that is no model.
        HubError: a repository that cannot be had.
    """
    path = local_folder(model.path, folder)
    if path is None or model.lora or model.revision or not path.is_dir():
        return open_source(model, folder)
    storage = LocalFolder(path)
    config = read_mapping(path / CONFIG, str(model)) if CONFIG in storage.names else {}
    return Source(str(model), path, config, {}, {})


def _with_adapter(base: Source, adapter: Adapter, label: str) -> Source:
    applied = apply_adapter(
        base.tensors,
        adapter.config,
        adapter.tensors,
        label=label,
        fingerprint=adapter.fingerprint,
        base=base.config,
        root=base.root,
    )
    other = base_note(adapter.config, base.label.partition("@")[0])
    notes = (*base.notes, *applied.notes, *([other] if other else []))
    return replace(
        base,
        label=label,
        tensors=applied.tensors,
        adapter=adapter,
        config=changed_config(base.config, applied.changes),
        notes=notes,
    )


def _looked_for(path: str, folder: Path) -> str:
    """Where a folder was looked for, and the neighbour that may have been meant."""
    near = _neighbour(path, folder)
    if near:
        return f"Did you mean '{near}'?"
    if Path(path).is_absolute() or folder == Path.cwd():
        return "Check the path."
    return f"Looked in {folder}, the recipe's folder, and in {Path.cwd()}."


def _neighbour(path: str, folder: Path) -> str:
    """The folder beside it whose name is nearest; empty where none is near."""
    requested = folder / expanded(path)
    try:
        siblings = [p.name for p in requested.parent.iterdir()]
    except (OSError, ValueError):  # no such folder, none that may be read, no name for one
        siblings = []
    near = difflib.get_close_matches(requested.name, siblings, n=1)
    return path.removesuffix(requested.name) + near[0] if near else ""


def _open_folder(path: Path, label: str) -> Source:
    if not path.is_dir():
        return _open_file(path, label)
    fingerprints = folder_fingerprints(path)
    try:
        folder = LocalFolder(path)
    except OSError as error:
        hint = "Check who may read it."
        raise SourceError(f"cannot be read: {error.strerror}", model=label, hint=hint) from error
    opened = _open_dcp(folder, label) if _is_dcp(folder.names) else _opened(folder, label)
    return replace(opened, fingerprints=fingerprints)


def _open_file(path: Path, label: str) -> Source:
    if is_whole_folder(path, label):
        return _open_folder(path.parent, label)
    opened = _of_file(open_file(path, label), label)
    return replace(opened, fingerprints=folder_fingerprints(opened.root))


def _of_file(model: FileModel, label: str) -> Source:
    return Source(
        label,
        model.root,
        model.decoded.config,
        model.decoded.tensors,
        {model.name: model.header},
        notes=model.notes,
        file=model.name,
        quantization=model.decoded.quantization,
        left_out=model.decoded.left_out,
    )


def _is_dcp(names: Collection[str]) -> bool:
    return is_checkpoint(names) and not any(name.endswith(SAFETENSORS) for name in names)


def _open_dcp(folder: ModelStorage, label: str, repository: Repository | None = None) -> Source:
    """A distributed checkpoint.

    Args:
        repository: where its files are, if they are elsewhere.
    """
    open_file = None
    if repository is not None:
        repository.fetch([name for name in (METADATA, NAMES) if name in folder.names])
        open_file = _opener(repository)
    config = read_mapping(folder.root / CONFIG, label) if CONFIG in folder.names else {}
    model = open_checkpoint(folder.root, label, open_file)
    tensors, more = dict(model.tensors), []
    if NAMES in folder.names:
        tensors = renamed(tensors, _rules(folder.root / NAMES, label), config, label)
    elif any(name.startswith(MEGATRON) for name in tensors):
        more = [f"its names are Megatron's: {NAMES} beside it says what they become"]
    left_out = f"; {len(model.left_out)} others are left out" if model.left_out else ""
    notes = [
        f"a distributed checkpoint; {len(model.tensors)} tensors of the model are read{left_out}",
        "" if config else NO_CONFIG,
    ]
    headers = dict.fromkeys(model.files, b"")  # such files have none: `.metadata` has said it all
    return Source(
        label, folder.root, config, tensors, headers, notes=tuple(filter(None, [*notes, *more]))
    )


def _opener(repository: Repository) -> OpenFile:
    """Opens parts where they are. Of each some hundred bytes at both ends are read."""

    def opened(name: str) -> tuple[BinaryIO, int]:
        if name not in repository.files:
            raise Unreadable("is missing: `.metadata` names it")
        return repository.open(name, _PART_BLOCK), repository.files[name]

    return opened


def _rules(path: Path, label: str) -> list[Rule]:
    try:
        return parse_rules(read_front(read_text(path)))
    except Unreadable as error:
        raise CorruptFileError(str(error), model=label, file=path.name) from None


def _open_repository(repository: Repository, name: str, label: str) -> Source:
    """A repository as a model, or a file of it.

    Args:
        name: of the file; empty for all of it, `:WORD` for the GGUF file with that word.

    Raises:
        SourceError: it has no such file.
    """
    if not name:
        storage = StoredElsewhere(repository)
        is_dcp = _is_dcp(storage.names)
        opened = _open_dcp(storage, label, repository) if is_dcp else _opened(storage, label)
        return _with_repository(opened, repository)
    files = repository.files
    name = _gguf_named(name[1:], files, label) if name.startswith(":") else name
    if name not in files:
        near = difflib.get_close_matches(name, files, n=1)
        others = [file for file in files if file.endswith(Path(name).suffix)]
        hint = f"Did you mean '{near[0]}'?" if near else f"It has {', '.join(sorted(others)[:5])}."
        raise SourceError("the repository has no such file", model=label, file=name, hint=hint)
    if CONFIG in files and "/" not in name and not name.endswith(GGUF):
        storage = StoredElsewhere(repository)  # fetches config and tokenizer
        top_level = {file for file in files if "/" not in file}
        index = read_index(storage.root / INDEX, label) if INDEX in files else None
        if is_all_weights(name, top_level, index, label):
            return _with_repository(_opened(storage, label), repository)
    model = open_stored_file(repository, name, label)
    return _with_repository(_of_file(model, label), repository)


def _gguf_named(word: str, files: Iterable[str], label: str) -> str:
    """The GGUF file with a quantisation in its name, as llama.cpp finds it.

    Raises:
        SourceError: there is none, or more than one.
    """
    every = sorted(file for file in files if file.endswith(GGUF))
    fits = re.compile(rf"[-._]{re.escape(word)}\{GGUF}$", re.IGNORECASE)
    named = [file for file in every if fits.search(file)]
    if len(named) == 1:
        return named[0]
    message = f"{len(named) or 'no'} GGUF files of it are called {word}"
    hint = f"It has {', '.join(named or every)[:300]}." if every else "It has no GGUF files."
    raise SourceError(message, model=label, hint=hint)


def _with_repository(source: Source, repository: Repository) -> Source:
    notes = (repository.note, *source.notes) if repository.note else source.notes
    if isinstance(repository, hub.HubModel):
        return replace(source, hub=repository, notes=notes)
    assert isinstance(repository, RemoteModel)
    return replace(source, remote=repository, notes=notes)


def _opened(storage: ModelStorage, label: str) -> Source:
    """From the headers of its files; quantised weights as numbers."""
    config = read_mapping(storage.root / CONFIG, label) if CONFIG in storage.names else {}
    stored, headers = read_headers(storage, label)
    model = read_as_numbers(stored, config, label)
    return Source(
        label,
        storage.root,
        model.config,
        model.tensors,
        headers,
        notes=tuple(filter(None, [_kind(storage, config), *model.notes])),
        quantization=model.quantization,
        left_out=model.left_out,
    )


def _kind(storage: ModelStorage, config: Mapping[str, Any]) -> str:
    """What a reader should know of a model that is not one folder with a config."""
    parts = part_folders(storage.names, storage.modules)
    lacking = [f for f in storage.modules if f and not names_in(f, storage.names)]
    if lacking:
        return f"modules.json names {', '.join(lacking)}, which is not there"
    if parts != [""] and storage.modules:
        return f"sentence-transformers; {', '.join(filter(None, parts))} merged, too"
    if parts != [""]:
        return f"a pipeline; {', '.join(parts)} are merged, everything else is copied"
    return "" if config else NO_CONFIG
