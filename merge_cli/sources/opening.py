"""Opening a model from its headers: a folder, a file, a repository of the Hub, or an address.

It reads kilobytes: config.json, the index, the headers of the shards. For a model on the Hub or at
an address only those are fetched; the shards follow in `fetch_weights`, and only those that the
merge needs. Nothing here executes anything from a checkpoint. Here is where files are looked for;
stored_model.py makes a model of them.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from merge_cli.checkpoint.fingerprint import folder_fingerprints
from merge_cli.checkpoint.repository import Repository
from merge_cli.errors import HubError, SourceError
from merge_cli.formats.endings import GGUF
from merge_cli.hub import models as hub
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
from merge_cli.sources.single_file import (
    CONFIG,
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
    StoredElsewhere,
    read_index,
)
from merge_cli.sources.stored_model import (
    model_of,
    model_of_file,
    model_of_shards,
)
from merge_cli.system.paths import require_text
from merge_cli.system.untrusted import read_mapping

if TYPE_CHECKING:
    from merge_cli.remote.models import RemoteModel


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
        from merge_cli.sources.adapted import with_adapter  # which few recipes need

        base = open_source(ModelRef(model.path, model.revision), folder)
        return with_adapter(base, model, folder)
    path = local_folder(model.path, folder)
    if path is not None:
        require_text(path)
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
    from merge_cli.remote.models import open_remote, open_remote_file

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
    require_text(path)
    storage = LocalFolder(path)
    config = read_mapping(path / CONFIG, str(model)) if CONFIG in storage.names else {}
    return Source(str(model), path, config, {}, {})


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
    return replace(model_of(folder, label), fingerprints=fingerprints)


def _open_file(path: Path, label: str) -> Source:
    if is_whole_folder(path, label):
        return _open_folder(path.parent, label)
    opened = model_of_file(open_file(path, label), label)
    return replace(opened, fingerprints=folder_fingerprints(opened.root))


def _open_repository(repository: Repository, name: str, label: str) -> Source:
    """A repository as a model, or a file of it.

    Args:
        name: of the file; empty for all of it, `:WORD` for the GGUF file with that word.

    Raises:
        SourceError: it has no such file.
    """
    if not name:
        opened = model_of(StoredElsewhere(repository), label, repository)
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
            return _with_repository(model_of_shards(storage, label), repository)
    model = open_stored_file(repository, name, label)
    return _with_repository(model_of_file(model, label), repository)


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
    return replace(source, remote=cast("RemoteModel", repository), notes=notes)
