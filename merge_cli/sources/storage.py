"""Where a model's files are, in a folder or elsewhere: which hold weights, and their headers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain, repeat
from operator import attrgetter
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from merge_cli.checkpoint.auxiliary_files import CARD, is_companion, is_part_file, is_weight
from merge_cli.checkpoint.components import (
    MODULES,
    PIPELINE,
    STEMS,
    index_of,
    inside,
    module_folders,
    names_in,
    part_folders,
    stem_of,
)
from merge_cli.checkpoint.header_columns import HeaderColumns, shared_names
from merge_cli.checkpoint.headers import TensorRef, header_columns, read_header_file
from merge_cli.checkpoint.repository import Repository
from merge_cli.checkpoint.stored_tensors import StoredTensors
from merge_cli.errors import CorruptFileError, SourceError
from merge_cli.formats.endings import PICKLES
from merge_cli.system.shell import command
from merge_cli.system.untrusted import Unreadable, kind_of, parse_json, read_json


class ModelStorage(Protocol):
    """A model's files.

    Attributes:
        names: their paths, relative to `root`.
        root: where they are, or will be.
        modules: the folders that its modules.json names.
    """

    names: frozenset[str]
    root: Path
    modules: tuple[str, ...]

    def has(self, name: str) -> bool:
        """Whether a file is there, wherever in the folder."""

    def header(self, name: str, label: str) -> tuple[bytes, int]:
        """The raw header of a file of weights, and the file's size."""


class LocalFolder:
    """A folder on disk, and in a pipeline those inside it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        names = {path.name for path in root.iterdir()}
        if PIPELINE in names:
            names |= {path.relative_to(root).as_posix() for path in root.glob("*/*")}
        self.modules: tuple[str, ...] = module_folders(root, str(root))
        for folder in filter(None, self.modules):
            names |= {path.relative_to(root).as_posix() for path in (root / folder).glob("*")}
        self.names = frozenset(names)

    def has(self, name: str) -> bool:
        return (self.root / name).exists()

    def header(self, name: str, label: str) -> tuple[bytes, int]:
        file = self.root / name
        return read_header_file(file, label), file.stat().st_size


class StoredElsewhere:
    """A repository's files, of which the small ones are fetched at once."""

    def __init__(self, model: Repository) -> None:
        self._model = model
        self.names = frozenset(model.files)
        self.modules: tuple[str, ...] = ()
        if MODULES in self.names:
            self.modules = module_folders(model.fetch([MODULES]))
        parts = part_folders(self.names, self.modules)
        indexes = {inside(part, index_of(stem_of(names_in(part, self.names)))) for part in parts}
        top_level = {name for name in self.names if "/" not in name or _is_template(name)}
        small = {
            n for n in top_level if is_companion(n) or _is_template(n) or n in ("config.json", CARD)
        }
        named = tuple(f"{folder}/" for folder in self.modules if folder)
        small |= {n for n in self.names if named and n.startswith(named) and is_part_file(n)}
        if PIPELINE in self.names and parts != [""]:
            small = {name for name in self.names if not is_weight(name) and name.count("/") < 2}
        self.root = model.fetch(sorted(small | (indexes & self.names)))

    def has(self, name: str) -> bool:
        return name in self.names

    def header(self, name: str, label: str) -> tuple[bytes, int]:
        cached = self.root / name
        size = cached.stat().st_size if cached.exists() else self._model.files[name]
        return self._model.read_header(name), size


def _is_template(name: str) -> bool:
    return name.startswith("additional_chat_templates/") and name.endswith(".jinja")


def read_headers(
    storage: ModelStorage, label: str
) -> tuple[Mapping[str, TensorRef], Mapping[str, bytes]]:
    """Every tensor by name, and the raw headers by file.

    Raises:
        SourceError: no weights, or pickled ones alone.
        CorruptFileError: an index or header that does not hold.
    """
    tensors: dict[str, TensorRef] = {}
    headers: dict[str, bytes] = {}
    parts = part_folders(storage.names, storage.modules)
    for part in parts:
        if "/" in part:
            message = f"{MODULES} names a folder within a folder, whose weights are not merged"
            raise SourceError(message, model=label, file=part)
        names = names_in(part, storage.names)
        index_file = index_of(stem_of(names))
        index = read_index(storage.root / part / index_file, label) if index_file in names else None
        shards, index = find_shards(names, index, label)
        columns: list[HeaderColumns] = []
        for shard in shards:
            if not storage.has(inside(part, shard)):
                message = "the index names this file, but it is missing"
                hint = "Download or copy it again."
                raise CorruptFileError(message, model=label, file=inside(part, shard), hint=hint)
            raw, size = storage.header(inside(part, shard), label)
            columns.append(header_columns(raw, storage.root / part / shard, size, label))
            headers[inside(part, shard)] = columns[-1].raw
        joined = join_shards(shards, columns, index, label)
        paths = (
            repeat(storage.root / part / shard, len(there.names))
            for shard, there in zip(shards, columns, strict=True)
        )
        stored = StoredTensors(joined, chain.from_iterable(paths), label)
        if parts == [""]:
            return stored, headers
        for name, ref in stored.items():
            tensors[inside(part, name)] = ref._replace(name=inside(part, name))
    return tensors, headers


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """What an index says. Fine-tunes share the one of their base, byte for byte: it is one object.

    Attributes:
        weight_map: tensor name -> file, not checked yet.
    """

    weight_map: Any

    @cached_property
    def files(self) -> Sequence[Any]:
        """Each file once; every entry where one is no text."""
        files = self.weight_map.values()
        return [*(dict.fromkeys(files) if {*map(type, files)} == {str} else files)]

    def first_in(self, file: Any) -> str:
        """The first tensor of a file."""
        name: str = next(
            name for name, value in self.weight_map.items() if value is file or value == file
        )
        return name


def read_index(path: Path, label: str) -> ShardIndex:
    """A model's index.

    Raises:
        CorruptFileError: it is not a mapping.
    """
    index: ShardIndex = read_json(path, label, parse=_parse_index)
    return index


@lru_cache(maxsize=2)
def _parse_index(text: bytes) -> ShardIndex:
    json = parse_json(text)
    if not isinstance(json, dict):
        raise Unreadable(f"is not a mapping but {kind_of(json)}")
    return ShardIndex(json.get("weight_map"))


INDEX = index_of(STEMS[0])
# Whole copies of the same weights in another naming, which some repositories carry beside them.
_DUPLICATES = ("consolidated",)


def find_shards(
    names: set[str], index: ShardIndex | None, label: str
) -> tuple[list[str], ShardIndex | None]:
    """Which files hold the weights, in transformers' order of preference, and the index if it says.

    Raises:
        SourceError, CorruptFileError: see `read_headers`.
    """
    stem = stem_of(names)
    single, file = f"{stem}.safetensors", index_of(stem)
    if single in names:
        return [single], None
    if index is not None:
        if not isinstance(index.weight_map, dict) or not index.weight_map:
            raise CorruptFileError("has no weight_map", model=label, file=file)
        for shard in index.files:
            problem = _no_shard(shard)
            if problem:
                tensor = index.first_in(shard)
                raise CorruptFileError(problem, model=label, file=file, tensor=tensor)
        return sorted({*index.files}), index
    shards = sorted(
        name
        for name in names
        if name.endswith(".safetensors")
        and not name.startswith("adapter_")
        and not name.startswith(_DUPLICATES)
    )
    if shards:
        return shards, None
    if any(name.startswith("adapter_") for name in names):
        message = "this is a LoRA adapter, not a model"
        hint = f"Name its base, too: `BASE+{label}`. Or merge adapters alone: `output: adapter`."
        raise SourceError(message, model=label, hint=hint)
    pickled = sorted(name for name in names if name.endswith(PICKLES))
    if pickled:
        message = f"its weights are pickled ({pickled[0]}), and opening a pickle runs its code"
        convert = command("convert", label, "converted")
        hint = f"Write it as safetensors; nothing in it is run: {convert}"
        raise SourceError(message, model=label, hint=hint)
    packed = next((name for name in sorted(names) if name.endswith(".gguf")), None)
    if packed:
        message = f"its weights are a GGUF file ({packed})"
        hint = f"Name the file itself: {label}/{packed}"
        raise SourceError(message, model=label, hint=hint)
    raise SourceError("has no safetensors files", model=label, hint="Is this a model's folder?")


def _no_shard(shard: Any) -> str:
    """Why an index must not name this as a file; empty where it may."""
    path = PurePosixPath(str(shard))
    if not str(shard).isprintable() or len(str(shard)) > 200:
        return f"names a file by what is no name: {str(shard)[:60]!r}"
    if path.is_absolute() or ".." in path.parts or "\\" in str(shard):
        return f"names a file outside the model's folder: '{shard}'"
    if not isinstance(shard, str) or not shard.endswith(".safetensors"):
        return f"names a file that is not safetensors: {shard!r}"
    return ""


def join_shards(
    shards: Sequence[str], columns: Sequence[HeaderColumns], index: ShardIndex | None, label: str
) -> HeaderColumns:
    """All tensors of a model, shard by shard.

    Args:
        shards: the files' names, in the order of `columns`.
        index: where it says which tensor is in which file.

    Raises:
        CorruptFileError: a tensor that is in two files, or is not where the index says.
    """
    joined = _joined(tuple(shards), tuple(columns), index)
    if joined is not None:
        return joined
    first: dict[str, str] = {}
    for shard, there in zip(shards, columns, strict=True):
        for name in there.names:
            if first.setdefault(name, shard) != shard:
                message = f"occurs in two files, {first[name]} and {shard}"
                raise CorruptFileError(message, model=label, tensor=name)
    weight_map = index.weight_map if index is not None else {}
    name = next(name for name, shard in weight_map.items() if first.get(name) != shard)
    message = "the index places this tensor here, but the file does not have it"
    raise CorruptFileError(message, model=label, file=weight_map[name], tensor=name)


@lru_cache(maxsize=4)
def _joined(
    shards: tuple[str, ...], columns: tuple[HeaderColumns, ...], index: ShardIndex | None
) -> HeaderColumns | None:
    """As `join_shards`, once for models whose headers and index are the same; None on an error."""
    fields = attrgetter("names", "dtypes", "shapes", "offsets", "sizes")
    rows = map(chain.from_iterable, zip(*map(fields, columns), strict=True))
    names, dtypes, shapes, offsets, sizes = map(tuple, rows)
    joined = HeaderColumns(shared_names(names), dtypes, shapes, offsets, sizes)
    counts = (len(there.names) for there in columns)
    placed = dict(zip(joined.names, chain.from_iterable(map(repeat, shards, counts)), strict=True))
    if len(placed) < len(joined.names):
        return None
    if index is None or placed == index.weight_map or placed.items() >= index.weight_map.items():
        return joined
    return None
