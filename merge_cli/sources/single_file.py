"""A file of weights as a model: safetensors, GGUF, or what `torch.save` has written.

A GGUF file has its config and its tokenizer in it. Any other file has those beside it, if there is
a config.json. Without one it is weights alone, and nothing beside it belongs to it. What has
nothing beside it is read from a folder in the cache with a link to it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from merge_cli.checkpoint.components import PIPELINE
from merge_cli.checkpoint.headers import parse_header, read_raw_header
from merge_cli.checkpoint.repository import Repository
from merge_cli.errors import CorruptFileError, SourceError
from merge_cli.formats.detect import read_as_numbers
from merge_cli.formats.endings import GGUF, PICKLES
from merge_cli.sources.linked import FileModel, link_folder, linked_folder
from merge_cli.sources.storage import INDEX, LocalFolder, ShardIndex, find_shards, read_index
from merge_cli.system.untrusted import Unreadable, open_regular, read_mapping

CONFIG = "config.json"
SAFETENSORS = ".safetensors"
NO_CONFIG = "has no config.json"  # a note
KINDS = (SAFETENSORS, GGUF, *PICKLES)
_SHOWN = 3  # names in a note


@dataclass(frozen=True)
class _File:
    """A file that is to be opened.

    Attributes:
        root, name: where it is read from, once it is there.
        config: of its folder; None where it is alone.
    """

    root: Path
    name: str
    label: str
    config: Mapping[str, Any] | None

    @property
    def path(self) -> Path:
        return self.root / self.name


def is_weights(name: str) -> bool:
    """Whether a file of that name may be a model."""
    return Path(name).suffix in KINDS


def open_file(path: Path, label: str) -> FileModel:
    """Open a file of weights on disk.

    Raises:
        SourceError: not a file of weights, or a kind of tensors that is not read.
        CorruptFileError: a header that does not hold.
        ResourceError: the cache cannot be written.
    """
    if not is_weights(path.name):
        hint = f"Name the model's folder, or a file that ends with one of {', '.join(KINDS)}."
        if path.suffix == ".nemo":
            hint = "A NeMo archive: unpack it with tar, and name the folder of its weights."
        raise SourceError("not a folder, and not a file of weights", model=label, hint=hint)
    try:
        with open_regular(path) as file:
            if path.suffix != GGUF and (path.parent / CONFIG).is_file():
                root, config = path.parent, read_mapping(path.parent / CONFIG, label)
                return _opened(file, path.stat().st_size, _File(root, path.name, label, config))
            kind = "gguf" if path.suffix == GGUF else "files"
            opened = _File(linked_folder(kind, path, label), path.name, label, None)
            return _opened(file, os.fstat(file.fileno()).st_size, opened)
    except Unreadable as error:
        raise CorruptFileError(str(error), model=label, file=path.name) from None
    except OSError as error:
        message = f"cannot be read: {error.strerror}"
        raise CorruptFileError(message, model=label, file=path.name) from error


def open_stored_file(repository: Repository, name: str, label: str) -> FileModel:
    """Open a file of a repository, of which the header is fetched.

    Raises:
        as `open_file` does; HubError, RemoteError: what is needed of it cannot be had.
    """
    has_config = name.endswith(GGUF) is False and "/" not in name and CONFIG in repository.files
    config = read_mapping(repository.folder / CONFIG, label) if has_config else None
    root = repository.folder
    if not has_config:
        kind = "gguf" if name.endswith(GGUF) else "files"
        identity = (repository.repo_id, repository.commit, name, str(root))
        root = link_folder(kind, name, root / name, identity)
    with repository.open(name) as file:
        return _opened(file, repository.files[name], _File(root, name, label, config))


def _opened(file: BinaryIO, size: int, opened: _File) -> FileModel:
    name, label = opened.path.name, opened.label
    # Few models are such files: their readers are loaded where one is.
    if name.endswith(GGUF):
        from merge_cli.formats.gguf.header import parse_header as parse_gguf
        from merge_cli.sources.gguf import lay_out_gguf

        header = parse_gguf(file, size, name, label)
        return lay_out_gguf(header, opened.root, opened.name, label)
    notes = [] if opened.config is not None else [NO_CONFIG]
    raw = b""
    if name.endswith(SAFETENSORS):
        raw = read_raw_header(file, name, label)
        tensors = parse_header(raw, opened.path, size, label)
    else:
        from merge_cli.formats.pickled import open_pickle

        pickled = open_pickle(file, size, label, opened.path)
        tensors = dict(pickled.tensors)
        if pickled.left_out:
            names = ", ".join(pickled.left_out[:_SHOWN])
            more = f" and {len(pickled.left_out) - _SHOWN} more" * (len(pickled.left_out) > _SHOWN)
            notes.append(f"left out, since they are no weights of the model: {names}{more}")
    decoded = read_as_numbers(tensors, opened.config or {}, label)
    return FileModel(opened.root, opened.name, decoded, raw, (*notes, *decoded.notes))


def is_all_weights(name: str, names: set[str], index: ShardIndex | None, label: str) -> bool:
    """Whether a file is all the weights of the model in its folder: then the folder is meant.

    Args:
        names: the folder's files.
        index: what its index says; None without one.

    Raises:
        SourceError: it is one of several shards.
    """
    is_pipeline = PIPELINE in names or "modules.json" in names
    if not name.endswith(SAFETENSORS) or CONFIG not in names or is_pipeline:
        return False
    shards, index = find_shards(names, index, label)
    if index is not None and name in shards and len(shards) > 1:
        message = f"one of {len(shards)} files that the index of its folder names"
        raise SourceError(message, model=label, file=name, hint="Name the folder.")
    return shards == [name]


def is_whole_folder(path: Path, label: str) -> bool:
    """`is_all_weights` of a file on disk."""
    if path.suffix != SAFETENSORS or not (path.parent / CONFIG).is_file():
        return False
    names = set(LocalFolder(path.parent).names)
    index = read_index(path.parent / INDEX, label) if INDEX in names else None
    return is_all_weights(path.name, names, index, label)
