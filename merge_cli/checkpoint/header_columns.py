"""Safetensors headers as columns: names, dtypes, shapes, offsets and sizes of all tensors at once.

A large mixture of experts has 100,000 tensors: each check looks at a whole column. What is out of
the ordinary, or does not hold, is left to `headers.py`, which looks at the entries one by one.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Any

from merge_cli.checkpoint.dtypes import DTYPES, width_of

MAX_DIMENSIONS = 64  # numpy's limit; torch has the same
MAX_NUMBER = 2**63  # of any system that counts bytes


@dataclass(frozen=True, eq=False)
class HeaderColumns:
    """A header that holds in every point, in the order of the data. See `TensorRef`.

    Two are equal if they are one object: what has been found out about one need not be again.

    Attributes:
        raw: the header itself, if it is one; models that have the same can share it.
    """

    names: Sequence[str]
    dtypes: Sequence[str]
    shapes: Sequence[tuple[int, ...]]
    offsets: Sequence[int]
    sizes: Sequence[int]
    raw: bytes = field(default=b"", repr=False)

    @cached_property
    def rows(self) -> dict[str, int]:
        """Name -> index in the columns."""
        return dict(zip(self.names, range(len(self.names)), strict=True))


# What stands between two names of a header as safetensors writes it, and behind the last: dtype
# and shape in one group, then where the data begins and ends. Writers in Python leave spaces.
_BETWEEN_NAMES = re.compile(
    r'": ?\{"dtype": ?"([A-Z0-9_]+", ?"shape": ?\[[0-9, ]*\]), ?'
    r'"data_offsets": ?\[([0-9]+), ?([0-9]+)\]\}(?:, ?"|\}[ \t\r\n]*\Z)'
)
_BEFORE_NAMES = re.compile(r'\{(?:"__metadata__": ?(\{.*\}), ?)?"', re.DOTALL)


@lru_cache(maxsize=256)
def columns_at_once(raw: bytes, file_size: int) -> HeaderColumns | None:
    """All entries at once, each check over a whole column; None where one does not hold.

    A large mixture of experts has 100,000. No JSON is read but of dtypes and shapes, of which there
    are few: splitting a text takes a third of the time that parsing it takes.
    """
    data_start = 8 + int(struct.unpack("<Q", raw[:8])[0])
    if len(raw) < data_start:
        return None
    try:
        text = raw[8:data_start].decode()
    except UnicodeDecodeError:
        return None
    first, *parts = _BETWEEN_NAMES.split(text)
    # The name behind the last tensor is empty: its entry ends the header.
    described, starts, stops, names = (parts[i::4] for i in range(4))
    before, quote, first_name = first.rpartition('"')
    names = [first_name, *names]
    all_names = "".join(names)
    if (
        len(names) < 2
        or names.pop()
        or not text.rstrip(" \t\r\n").endswith("}}")
        or not all_names.isprintable()
        or '"' in all_names
        or "\\" in all_names
        or len({*names, "__metadata__"}) <= len(names)
        or not _is_beginning(before + quote)
        or starts != ["0", *stops[:-1]]
    ):
        return None
    kinds = {text: _kind(text) for text in {*described}}
    if None in kinds.values():
        return None
    dtypes, shapes, sizes = zip(*map(kinds.__getitem__, described), strict=True)
    ends = [*accumulate(sizes, initial=0)]
    if [*map(str, ends[1:])] != stops or data_start + ends.pop() != file_size:
        return None
    offsets = [*map(data_start.__add__, ends)]
    return HeaderColumns(shared_names(tuple(names)), dtypes, shapes, offsets, sizes, raw)


@lru_cache(maxsize=256)
def shared_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """The same names, as an earlier model has them: one string serves all of them."""
    return names


def _is_beginning(text: str) -> bool:
    """Whether a header may have this before its first name: a brace, and metadata that hold."""
    match = _BEFORE_NAMES.fullmatch(text)
    if match is None or match[1] is None:
        return match is not None
    try:
        metadata = load_unique(match[1].encode())
    except (ValueError, RecursionError):
        return False
    return all(isinstance(value, str) for value in metadata.values())


@lru_cache(maxsize=4096)
def _kind(text: str) -> tuple[str, tuple[int, ...], int] | None:
    """Dtype, shape and bytes of a header's `BF16","shape":[4,2]`; None where these are none."""
    dtype, _, shape_text = text.partition('"')
    try:
        shape = tuple(json.loads(shape_text[shape_text.index("[") :]))
    except ValueError:
        return None
    if dtype not in DTYPES or len(shape) > MAX_DIMENSIONS or max(shape, default=0) >= MAX_NUMBER:
        return None
    return alike(dtype, shape)


@lru_cache(maxsize=4096)
def alike(dtype: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...], int]:
    """Dtype, shape and bytes: the same objects for the thousands of tensors that are alike."""
    return dtype, shape, math.prod(shape) * width_of(dtype)


def load_unique(text: bytes) -> Any:
    """JSON without a key that occurs twice.

    Asking that of each mapping takes longer than all the rest. A colon stands behind every key, so
    as many keys as colons prove it; colons inside strings lead to the slow way, as errors do.
    """
    with suppress(ValueError, RecursionError):
        entries = json.loads(text)
        mappings = [entries, *entries.values()] if isinstance(entries, dict) else []
        keys = sum(len(mapping) for mapping in mappings if isinstance(mapping, dict))
        if keys == text.count(b":"):
            return entries
    return json.loads(text, object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"'{next(n for n in names if names.count(n) > 1)}' occurs twice")
    return result
