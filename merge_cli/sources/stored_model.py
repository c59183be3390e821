"""What stored files are as a model: shards with headers, a distributed checkpoint, or one file.

Where they are was found before: opening.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from merge_cli.checkpoint.components import (
    names_in,
    part_folders,
)
from merge_cli.checkpoint.repository import Repository
from merge_cli.errors import CorruptFileError
from merge_cli.formats.dcp.metadata import METADATA
from merge_cli.formats.dcp.model import is_checkpoint, open_checkpoint
from merge_cli.formats.dcp.names import MEGATRON, NAMES, Rule, parse_rules, renamed
from merge_cli.formats.dcp.storage import OpenFile
from merge_cli.formats.detect import read_as_numbers
from merge_cli.sources.linked import FileModel
from merge_cli.sources.single_file import (
    CONFIG,
    NO_CONFIG,
    SAFETENSORS,
)
from merge_cli.sources.source import Source
from merge_cli.sources.storage import (
    ModelStorage,
    read_headers,
)
from merge_cli.system.untrusted import Unreadable, read_mapping, read_text
from merge_cli.system.untrusted_yaml import read_front

_PART_BLOCK = 2**14  # bytes that are fetched of a part elsewhere, at least


def model_of(storage: ModelStorage, label: str, repository: Repository | None = None) -> Source:
    """Shards with headers, or a distributed checkpoint.

    Args:
        repository: where the files are, if they are elsewhere.

    Raises:
        SourceError: no weights that can be read.
        CorruptFileError: an index, a header or names that do not hold.
    """
    names = storage.names
    if is_checkpoint(names) and not any(name.endswith(SAFETENSORS) for name in names):
        return _of_checkpoint(storage, label, repository)
    return model_of_shards(storage, label)


def model_of_file(model: FileModel, label: str) -> Source:
    """One file that is a model."""
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


def _of_checkpoint(folder: ModelStorage, label: str, repository: Repository | None) -> Source:
    """A distributed checkpoint."""
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


def model_of_shards(storage: ModelStorage, label: str) -> Source:
    """From the headers of its files; quantised weights as numbers.

    Raises:
        see `model_of`.
    """
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
