"""Which output tensor goes to which shard, and at which byte: known before anything is computed.

Headers come out byte for byte as `safetensors.torch.save_file(tensors, metadata={"format": "pt"})`
would write them: tensors by dtype (widest first), then by name, the header padded with spaces to
eight bytes.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from merge_cli.checkpoint.header import DTYPES

_NUMBER = re.compile(r"(\d+)")
_RANK = {dtype: rank for rank, dtype in enumerate(DTYPES)}


class OutputTensor(NamedTuple):
    """What a shard holds: a name, a safetensors dtype, a shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype][0]


@dataclass(frozen=True)
class Shard:
    """One output file. `offsets`: tensor name -> bytes from the start of the file."""

    file: str
    header: bytes
    offsets: dict[str, int]
    size: int


def lay_out(tensors: Sequence[OutputTensor], shard_size: int) -> list[Shard]:
    """Fill shards in the given order, each up to `shard_size` bytes of data.

    A tensor larger than that gets a shard of its own. One shard is called model.safetensors, more
    are numbered, as transformers does.
    """
    groups: list[list[OutputTensor]] = []
    room = 0
    for tensor in tensors:
        nbytes = tensor.nbytes
        if not groups or nbytes > room:
            groups.append([])
            room = shard_size
        groups[-1].append(tensor)
        room -= nbytes
    count = len(groups)
    if count <= 1:
        return [_shard("model.safetensors", groups[0] if groups else [])]
    return [
        _shard(f"model-{i:05d}-of-{count:05d}.safetensors", group)
        for i, group in enumerate(groups, start=1)
    ]


def index_json(shards: Sequence[Shard], tensors: Sequence[OutputTensor]) -> str:
    """The text of model.safetensors.index.json, as transformers writes it."""
    weight_map = {name: shard.file for shard in shards for name in shard.offsets}
    metadata = {
        "total_parameters": sum(math.prod(t.shape) for t in tensors),
        "total_size": sum(t.nbytes for t in tensors),
    }
    return json.dumps(
        {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}, indent=2
    ) + "\n"  # fmt: skip


def natural_key(name: str) -> tuple[object, ...]:
    """Sorts layers.10 after layers.9: the order in which a reader expects tensors."""
    parts: list[Any] = _NUMBER.split(name)  # text and numbers by turns
    parts[1::2] = map(int, parts[1::2])
    return len(parts) > 1 and not parts[0], *parts  # what begins with a number comes last


def _shard(file: str, tensors: Sequence[OutputTensor]) -> Shard:
    ordered = sorted(tensors, key=lambda t: (_RANK[t.dtype], t.name.encode()))
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    relative: dict[str, int] = {}
    position = 0
    for tensor in ordered:
        stop = position + tensor.nbytes
        entries[tensor.name] = {
            "dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [position, stop],
        }  # fmt: skip
        relative[tensor.name] = position
        position = stop
    body = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    body += b" " * (-len(body) % 8)
    header = struct.pack("<Q", len(body)) + body
    offsets = {name: len(header) + start for name, start in relative.items()}
    return Shard(file, header, offsets, len(header) + position)
