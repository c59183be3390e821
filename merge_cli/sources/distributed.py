"""A distributed checkpoint (`torch.distributed.checkpoint`) as a model."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

from merge_cli.checkpoint.repository import Repository
from merge_cli.errors import CorruptFileError
from merge_cli.formats.dcp.files import METADATA, NAMES
from merge_cli.formats.dcp.model import open_checkpoint
from merge_cli.formats.dcp.names import MEGATRON, Rule, parse_rules, renamed
from merge_cli.formats.dcp.storage import OpenFile
from merge_cli.sources.single_file import CONFIG, NO_CONFIG
from merge_cli.sources.source import Source
from merge_cli.sources.storage import ModelStorage
from merge_cli.system.untrusted import Unreadable, read_mapping, read_text
from merge_cli.system.untrusted_yaml import read_front

_PART_BLOCK = 2**14  # bytes that are fetched of a part elsewhere, at least


def model_of_checkpoint(folder: ModelStorage, label: str, repository: Repository | None) -> Source:
    """From `.metadata`, which names all tensors and where their parts are.

    Args:
        repository: where the files are, if they are elsewhere.

    Raises:
        SourceError: no weights that can be read.
        CorruptFileError: what the files say does not hold.
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
