"""A file of weights as a model: safetensors, or what `torch.save` has written.

With a config.json beside it, it is a model with that config and that tokenizer. Without one it is
weights alone, and nothing beside it belongs to it: a folder of the cache has a link to it.
"""

from __future__ import annotations

from pathlib import Path

from merge_cli.checkpoint.components import PIPELINE
from merge_cli.checkpoint.headers import parse_header, read_header_file
from merge_cli.errors import SourceError
from merge_cli.formats.detect import read_as_numbers
from merge_cli.formats.pickled import PICKLES, open_pickle
from merge_cli.sources.linked import FileModel, linked_folder
from merge_cli.sources.storage import INDEX, LocalFolder, find_shards
from merge_cli.system.untrusted import read_mapping

CONFIG = "config.json"
SAFETENSORS = ".safetensors"
NO_CONFIG = "has no config.json"  # a note
_SHOWN = 3  # names in a note


def has_whole_model(path: Path, label: str) -> bool:
    """Whether a file is all the weights of the model in its folder: then the folder is meant.

    Raises:
        SourceError: it is one of several shards.
    """
    if path.suffix != SAFETENSORS or not (path.parent / CONFIG).is_file():
        return False
    folder = LocalFolder(path.parent)
    if PIPELINE in folder.names or folder.modules:
        return False
    index = read_mapping(path.parent / INDEX, label) if INDEX in folder.names else None
    shards, weight_map = find_shards(set(folder.names), index, label)
    if weight_map is not None and path.name in shards and len(shards) > 1:
        message = f"one of {len(shards)} files that its folder's index names"
        hint = f"Name the folder: {path.parent}."
        raise SourceError(message, model=label, file=path.name, hint=hint)
    return shards == [path.name]


def open_file(path: Path, label: str) -> FileModel:
    """Open a file of weights.

    Raises:
        SourceError: not a file of weights, or a kind of tensors that is not read.
        CorruptFileError: a header that does not hold.
        ResourceError: the cache cannot be written.
    """
    if path.suffix not in (SAFETENSORS, *PICKLES):
        kinds = ", ".join((SAFETENSORS, ".gguf", *PICKLES))
        hint = f"Name the model's folder, or a file that ends with one of {kinds}."
        raise SourceError("not a folder, and not a file of weights", model=label, hint=hint)
    has_config = (path.parent / CONFIG).is_file()
    notes = [] if has_config else [NO_CONFIG]
    if path.suffix == SAFETENSORS:
        header = read_header_file(path, label)
        root = path.parent if has_config else linked_folder("files", path, label)
        tensors = parse_header(header, root / path.name, path.stat().st_size, label)
    else:
        header = b""
        root = path.parent if has_config else linked_folder("files", path, label)
        pickled = open_pickle(path, label, root / path.name)
        tensors = dict(pickled.tensors)
        if pickled.left_out:
            names = ", ".join(pickled.left_out[:_SHOWN])
            more = f" and {len(pickled.left_out) - _SHOWN} more" * (len(pickled.left_out) > _SHOWN)
            notes.append(f"left out, since they are no weights of the model: {names}{more}")
    config = read_mapping(root / CONFIG, label) if has_config else {}
    decoded = read_as_numbers(tensors, config, label)
    return FileModel(root, decoded, {path.name: header}, (*notes, *decoded.notes))
