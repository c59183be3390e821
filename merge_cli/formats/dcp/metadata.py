"""`.metadata` of a distributed checkpoint: its tensors, their parts, and where the bytes are.

The file is a pickle of `torch.distributed.checkpoint.metadata.Metadata`; it is read as data (see
`inert`), and every number is held against the others. The parts of a tensor must be a grid: along
each dimension they begin where others end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import PurePosixPath
from typing import Any

from merge_cli.checkpoint.dtypes import SAFETENSORS_NAMES
from merge_cli.formats.inert import Record, load_inert, name_of
from merge_cli.system.untrusted import CONTROL, Unreadable, whole_number

_MODULE = "torch.distributed.checkpoint.metadata"
_CLASSES = {
    _MODULE: (
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath", "Path"),
    "pathlib._local": ("PosixPath", "WindowsPath"),
}
# Megatron Core's own kind of `Metadata`: it has a dictionary more, which is not needed here.
_MEGATRON = (
    "megatron.core.dist_checkpointing.strategies.torch.MCoreMetadata",
    "megatron.core.dist_checkpointing.mapping.MCoreMetadata",
)
_MAX_DIMENSIONS = 8
_MAX_NUMBER = 2**63 - 1
_MAX_NAME = 1000
_MAX_PARTS = 1_000_000


@dataclass(frozen=True)
class Part:
    """A part of a tensor, and where it is.

    Attributes:
        offsets, sizes: where in the tensor it begins, and how far it goes.
        file: relative to the checkpoint.
        start, length: its bytes there.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor.

    Attributes:
        path: the keys that lead to it in what was saved.
        dtype: safetensors' name.
        parts: without empty ones.
    """

    path: tuple[str, ...]
    dtype: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Metadata:
    """What a checkpoint has: tensors by their full names, and the names of everything else."""

    tensors: dict[str, StoredTensor]
    others: tuple[str, ...]


def parse_metadata(raw: bytes) -> Metadata:
    """Read and check `.metadata`.

    Raises:
        Unreadable: not of the format, or contradicting itself; says which tensor.
    """
    content = load_inert(raw, _is_allowed)
    if name_of(content) not in (f"{_MODULE}.Metadata", *_MEGATRON):
        raise Unreadable("is no metadata of a distributed checkpoint")
    listed, records = content.get("state_dict_metadata"), content.get("storage_data")
    if not isinstance(listed, dict) or not isinstance(records, dict):
        raise Unreadable("has no list of tensors, or does not say where they are")
    paths = content.get("planner_data")
    storage = {}
    for index, record in records.items():
        name = index.get("fqn") if name_of(index) == f"{_MODULE}.MetadataIndex" else None
        if not isinstance(name, str):
            raise Unreadable("does not say whose a part is")
        offset = index.get("offset")
        storage[name, _sizes(offset) if offset is not None else None] = record
    tensors: dict[str, StoredTensor] = {}
    others = []
    for name, entry in listed.items():
        if not isinstance(name, str) or CONTROL.search(name) or len(name) > _MAX_NAME:
            raise Unreadable("has a name that is not text")
        kind = name_of(entry)
        if kind == f"{_MODULE}.BytesStorageMetadata":
            others.append(name)
            continue
        if kind != f"{_MODULE}.TensorStorageMetadata":
            raise Unreadable(f"says of {name} what is neither tensor nor bytes")
        try:
            path = _path(name, paths)
            tensors[name] = _tensor(name, entry, storage, path)
        except Unreadable as error:
            raise Unreadable(f"does not hold: {name}: {error}") from None
    return Metadata(tensors, tuple(others))


def _is_allowed(module: str, name: str) -> bool:
    is_dtype = module == "torch" and (name == "Size" or name in SAFETENSORS_NAMES)
    is_megatron = f"{module}.{name}" in _MEGATRON
    return is_dtype or is_megatron or name in _CLASSES.get(module, ())


def _path(name: str, paths: Any) -> tuple[str, ...]:
    """The keys that lead to a tensor; older checkpoints have its name alone."""
    path = paths.get(name) if isinstance(paths, dict) else None
    if not isinstance(path, tuple | list) or not path:
        return (name,)
    if not all(type(key) in (str, int) for key in path):
        raise Unreadable("its keys are no texts and numbers")
    return tuple(map(str, path))


def _tensor(
    name: str, entry: Record, storage: dict[Any, Any], path: tuple[str, ...]
) -> StoredTensor:
    dtype = _dtype(entry.get("properties"))
    shape = _sizes(entry.get("size"))
    chunks = entry.get("chunks")
    if not isinstance(chunks, list) or not 0 < len(chunks) <= _MAX_PARTS:
        raise Unreadable("it has no parts, or too many")
    parts = []
    for chunk in chunks:
        if name_of(chunk) != f"{_MODULE}.ChunkStorageMetadata":
            raise Unreadable("one of its parts is none")
        offsets, sizes = _sizes(chunk.get("offsets")), _sizes(chunk.get("sizes"))
        if not len(offsets) == len(sizes) == len(shape):
            raise Unreadable(f"a part of shape {list(sizes)} in a tensor of shape {list(shape)}")
        if 0 in sizes:
            continue  # of a process that has no share of a small tensor
        record = storage.get((name, offsets), storage.get((name, None)))
        parts.append(_placed(offsets, sizes, record))
    _check_grid(shape, parts)
    return StoredTensor(path, dtype, shape, tuple(sorted(parts, key=lambda part: part.offsets)))


def _dtype(properties: Any) -> str:
    """Its properties are a tuple, the dtype first; attributes in checkpoints of early versions."""
    state = properties.state if isinstance(properties, Record) else None
    first = state[0] if isinstance(state, tuple) and state else None
    if isinstance(state, dict):
        first = state.get("dtype")
    module, _, name = name_of(first).rpartition(".")
    if module != "torch" or name not in SAFETENSORS_NAMES:
        raise Unreadable("its dtype is not known")
    return SAFETENSORS_NAMES[name]


def _sizes(size: Any) -> tuple[int, ...]:
    """A `torch.Size`, as a tuple."""
    if isinstance(size, Record):
        size = size.arguments[0] if len(size.arguments) == 1 else None
    if not isinstance(size, tuple | list) or len(size) > _MAX_DIMENSIONS:
        raise Unreadable("a shape is no list of sizes")
    return tuple(whole_number(number, "a size", most=_MAX_NUMBER) for number in size)


def _placed(offsets: tuple[int, ...], sizes: tuple[int, ...], record: Any) -> Part:
    if not isinstance(record, Record):
        raise Unreadable(f"where its part at {list(offsets)} is, is not said")
    if record.get("transform_descriptors"):
        raise Unreadable("its parts are compressed, which is not read")
    file = record.get("relative_path")
    if not isinstance(file, str) or not file.isprintable() or not 0 < len(file) <= 200:
        raise Unreadable("its part is in a file of no name")
    path = PurePosixPath(file)
    if path.is_absolute() or ".." in path.parts or "\\" in file or path.suffix != ".distcp":
        raise Unreadable(f"its part is in '{file}', which is no .distcp file of the checkpoint")
    start = whole_number(record.get("offset"), "its part's place", most=_MAX_NUMBER)
    length = whole_number(record.get("length"), "its part's length", least=1, most=_MAX_NUMBER)
    return Part(offsets, sizes, file, start, length)


def _check_grid(shape: tuple[int, ...], parts: list[Part]) -> None:
    """Whether parts are cells of a grid over the whole tensor, each cell once.

    Raises:
        Unreadable: there is a gap or an overlap, or the cut is of another kind.
    """
    if math.prod(shape) == 0:
        raise Unreadable(f"a shape of {list(shape)} has no elements")
    cuts = list(_cuts(shape, parts))
    cells = set(product(*cuts)) if math.prod(map(len, cuts)) == len(parts) else set()
    present = {tuple(zip(part.offsets, part.sizes, strict=True)) for part in parts}
    if cells != present:
        raise Unreadable(f"its {len(parts)} parts are no grid over its shape {list(shape)}")


def _cuts(shape: tuple[int, ...], parts: list[Part]) -> Iterator[list[tuple[int, int]]]:
    """Along each dimension, the pieces that parts have there, one behind the other."""
    for dimension, length in enumerate(shape):
        pieces = sorted({(part.offsets[dimension], part.sizes[dimension]) for part in parts})
        end = 0
        for offset, size in pieces:
            if offset != end:
                raise Unreadable(f"its parts overlap or leave a gap at {end}")
            end = offset + size
        if end != length:
            raise Unreadable(f"its parts end at {end}, and the tensor at {length}")
        yield pieces
