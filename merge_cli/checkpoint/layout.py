"""Which output tensor goes to which shard, and at which byte: known before anything is computed.

Headers come out byte for byte as `safetensors.torch.save_file(tensors, metadata={"format": "pt"})`
would write them: tensors by dtype (widest first), then by name, the header padded with spaces to
eight bytes.
"""

from __future__ import annotations

import math
import re
import struct
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, chain, pairwise, repeat
from json.encoder import encode_basestring
from operator import attrgetter
from typing import Any, NamedTuple

from merge_cli.checkpoint.components import STEMS, index_of, part_of
from merge_cli.checkpoint.dtypes import DTYPES, width_of
from merge_cli.system.json_text import indented

_DIGITS = 18  # int() refuses what has thousands of digits
_NUMBER = re.compile(f"([0-9]{{1,{_DIGITS}}})")
_PLAIN: Mapping[str, str] = {"": STEMS[0]}
_RANK = {dtype: rank for rank, dtype in enumerate(DTYPES)}


class OutputTensor(NamedTuple):
    """What a shard holds: a name, a safetensors dtype, a shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return _nbytes(self.shape, self.dtype)


@lru_cache(maxsize=4096)
def _nbytes(shape: tuple[int, ...], dtype: str) -> int:
    # Thousands of tensors have few shapes.
    return math.prod(shape) * width_of(dtype)


@dataclass(frozen=True)
class Shard:
    """One output file.

    Attributes:
        file: its path in the model, with `folder`.
        offsets: tensor name -> bytes from the start of the file.
    """

    file: str
    header: bytes
    offsets: dict[str, int]
    size: int
    folder: str = ""


def lay_out(
    tensors: Sequence[OutputTensor], shard_size: int, stems: Mapping[str, str] = _PLAIN
) -> list[Shard]:
    """Fill shards in the given order, each up to `shard_size` bytes of data.

    A tensor larger than that gets a shard of its own. One shard is called model.safetensors, more
    are numbered, as transformers does.

    Args:
        stems: for each folder of the model what its files are called; see `components`.
    """
    if set(stems) == {""}:
        return _fill(tensors, shard_size, "", stems[""])
    by_folder: dict[str, list[OutputTensor]] = {folder: [] for folder in stems}
    for tensor in tensors:
        by_folder[part_of(tensor.name, stems)].append(tensor)
    return [
        shard
        for folder, outputs_there in by_folder.items()
        for shard in _fill(outputs_there, shard_size, folder, stems[folder])
    ]


def _fill(tensors: Sequence[OutputTensor], shard_size: int, folder: str, stem: str) -> list[Shard]:
    ends = [0, *accumulate(_sizes(tensors))]
    cuts = [0]
    while cuts[-1] < len(tensors):
        start = cuts[-1]
        stop = bisect_right(ends, ends[start] + shard_size, start + 1) - 1
        cuts.append(max(stop, start + 1))
    count = len(cuts) - 1
    if count <= 1:
        return [_shard(folder, f"{stem}.safetensors", tensors)]
    return [
        _shard(folder, f"{stem}-{i:05d}-of-{count:05d}.safetensors", tensors[start:stop])
        for i, (start, stop) in enumerate(pairwise(cuts), start=1)
    ]


def indexes(
    shards: Sequence[Shard], tensors: Sequence[OutputTensor], stems: Mapping[str, str]
) -> dict[str, str]:
    """File -> text of every index, as transformers writes it: of folders with several shards."""
    result = {}
    for folder, stem in stems.items():
        folder_shards = [shard for shard in shards if shard.folder == folder]
        if len(folder_shards) < 2:
            continue
        weight_map = {
            name.removeprefix(f"{folder}/"): shard.file.rpartition("/")[2]
            for shard in folder_shards
            for name in shard.offsets
        }
        names = {name for shard in folder_shards for name in shard.offsets}
        inside = [tensor for tensor in tensors if tensor.name in names]
        metadata = {
            "total_parameters": sum(math.prod(t.shape) for t in inside),
            "total_size": sum(t.nbytes for t in inside),
        }
        document = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
        name = index_of(stem)
        result[f"{folder}/{name}" if folder else name] = (
            indented(document, ensure_ascii=True) + "\n"
        )
    return result


@lru_cache(maxsize=4096)
def _padded(digits: str) -> str:
    """A number with leading zeros, so that text compares as numbers do."""
    return str(int(digits)).zfill(_DIGITS)


def natural_key(name: str) -> tuple[bool, str]:
    """Sorts layers.10 after layers.9: the order in which a reader expects tensors."""
    text = _with_padded(name)
    return text.startswith("\0"), text  # a number at the start comes last


def natural_order(names: Sequence[str]) -> list[int]:
    """Indexes of the names as `natural_key` sorts them."""
    # Most names differ behind `model.layers.7.` in what other layers have, too: of 100,000 names
    # there are few beginnings and few rests. No other name begins with a beginning, which ends in
    # no digit: so names compare by their beginnings, then by their rests.
    beginnings: list[str] = []
    rests: list[str] = []
    beginning = ""
    for name in names:
        if not beginning or not name.startswith(beginning):
            beginning = _beginning(name)
        beginnings.append(beginning or name)
        rests.append(name[len(beginning) :] if beginning else "")
    beginning_ranks, rest_ranks = _ranks(beginnings, natural_key), _ranks(rests, _with_padded)
    count = len(rest_ranks)
    ranks = [
        beginning_ranks[beginning] * count + rest_ranks[rest]
        for beginning, rest in zip(beginnings, rests, strict=True)
    ]
    return sorted(range(len(ranks)), key=ranks.__getitem__)


def _beginning(name: str) -> str:
    """All up to the first dot behind a number; empty where there is none."""
    number = _NUMBER.search(name)
    return name[: name.find(".", number.end()) + 1] if number else ""


def _ranks(texts: Sequence[str], key_of: Callable[[str], Any]) -> dict[str, int]:
    keys = {text: key_of(text) for text in {*texts}}
    ranks = {key: rank for rank, key in enumerate(sorted({*keys.values()}))}
    return {text: ranks[key] for text, key in keys.items()}


def _with_padded(text: str) -> str:
    parts = _NUMBER.split(text)  # text and numbers by turns
    parts[1::2] = map(_padded, parts[1::2])
    # NUL comes before every other character: a text that ends comes before one that goes on.
    return "\0".join(parts)


def _sizes(tensors: Sequence[OutputTensor]) -> Iterator[int]:
    """The bytes of each."""
    return map(_nbytes, map(attrgetter("shape"), tensors), map(attrgetter("dtype"), tensors))


def _shard(folder: str, file: str, tensors: Sequence[OutputTensor]) -> Shard:
    ordered = sorted(tensors)  # by code points, which is the order of UTF-8's bytes, too
    if len({*map(attrgetter("dtype"), ordered)}) > 1:
        ordered.sort(key=lambda tensor: _RANK[tensor.dtype])
    prefix = f"{folder}/" if folder else ""
    names, dtypes, shapes = zip(*ordered, strict=True) if ordered else ((), (), ())
    described, sizes = zip(*map(_described, dtypes, shapes), strict=True) if ordered else ((), ())
    bounds = [0, *accumulate(sizes)]
    # Parts of the text, joined once: json.dumps takes four times as long for 100,000.
    numbers = [*map(str, bounds)]
    entries = zip(
        repeat(',"'),
        _escaped([name.removeprefix(prefix) for name in names] if prefix else names),
        described,
        numbers,
        repeat(","),
        numbers[1:],
        repeat("]}"),
        strict=False,  # `repeat` never ends
    )
    metadata = '{"__metadata__":{"format":"pt"}'
    body = "".join([metadata, *chain.from_iterable(entries), "}"]).encode()
    body += b" " * (-len(body) % 8)
    header = struct.pack("<Q", len(body)) + body
    offsets = dict(zip(names, map(len(header).__add__, bounds), strict=False))
    return Shard(prefix + file, header, offsets, len(header) + bounds[-1], folder)


def _escaped(names: Sequence[str]) -> Sequence[str]:
    """Names as JSON has them between quotes: mostly as they are, which one look at all tells."""
    together = "".join(names)
    if encode_basestring(together) == f'"{together}"':
        return names
    return [encode_basestring(name)[1:-1] for name in names]


@lru_cache(maxsize=4096)
def _described(dtype: str, shape: tuple[int, ...]) -> tuple[str, int]:
    """What stands between name and offsets in a header's entry, and the tensor's bytes."""
    text = f'":{{"dtype":"{dtype}","shape":[{",".join(map(str, shape))}],"data_offsets":['
    return text, _nbytes(shape, dtype)
