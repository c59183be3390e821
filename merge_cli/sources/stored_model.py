"""What stored files are as a model: shards with headers, a distributed checkpoint, or one file.

Where they are was found before: opening.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from merge_cli.checkpoint.components import (
    names_in,
    part_folders,
)
from merge_cli.checkpoint.repository import Repository
from merge_cli.formats.dcp.files import is_checkpoint
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
from merge_cli.system.untrusted import read_mapping


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
        from merge_cli.sources.distributed import model_of_checkpoint  # which few models need

        return model_of_checkpoint(storage, label, repository)
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
