"""Safetensors headers: what is in a file, read from its first kilobytes and checked.

A header is trusted nowhere else, so everything that could make a later read wrong is refused here:
a length beyond the file, spans that overlap, leave gaps or run past the end, sizes that do not
follow from shape and dtype.
"""

from __future__ import annotations

import math
import struct
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import repeat
from operator import attrgetter
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from merge_cli.checkpoint.dtypes import DTYPES
from merge_cli.checkpoint.header_columns import (
    MAX_DIMENSIONS,
    MAX_NUMBER,
    HeaderColumns,
    alike,
    columns_at_once,
    load_unique,
)
from merge_cli.errors import CorruptFileError
from merge_cli.system.untrusted import CONTROL, Unreadable, open_regular

_MAX_HEADER = 100_000_000  # the format's own limit


class TensorRef(NamedTuple):
    """One tensor in one file of a model. `offset` counts from the start of the file.

    A tuple, as there is one for each tensor of each source: a frozen dataclass takes four times as
    long to make.
    """

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    model: str = ""

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def default_dtype(self) -> str:
        """See `tensors.Tensor`, of which this is the plain kind."""
        return self.dtype

    @property
    def stored(self) -> tuple[TensorRef, ...]:
        return (self,)

    @property
    def formula(self) -> str:
        return ""

    def fill(self, read: Any, start: int, buffer: memoryview) -> None:
        read(self, start, buffer)


def read_header_file(path: Path, model: str) -> bytes:
    """The raw header of a local file: its 8-byte length and the JSON.

    Raises:
        CorruptFileError: the file is missing, unreadable, or shorter than its header says.
    """
    try:
        with open_regular(path) as file:
            return read_raw_header(file, path.name, model)
    except (Unreadable, OSError) as error:
        why = f"cannot be read: {error.strerror}" if isinstance(error, OSError) else str(error)
        raise CorruptFileError(why, model=model, file=path.name) from error


def read_raw_header(file: BinaryIO, name: str, model: str) -> bytes:
    """The raw header of an opened file: its 8-byte length and the JSON.

    Raises:
        CorruptFileError: it does not begin with one.
    """
    start = file.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if len(start) < 8 or length > _MAX_HEADER:
        message = "not a safetensors file: it does not start with a header"
        raise CorruptFileError(message, model=model, file=name, hint=_AGAIN)
    return start + file.read(length)


def parse_header(raw: bytes, path: Path, file_size: int, model: str) -> dict[str, TensorRef]:
    """Check a raw header against the format and the size of its file.

    Returns:
        tensor name -> where it is, in the order of the data.

    Raises:
        CorruptFileError: anything that does not hold; names the tensor.
    """
    columns = header_columns(raw, path, file_size, model)
    return dict(zip(columns.names, refs_of(columns, repeat(path), model), strict=True))


def header_columns(raw: bytes, path: Path, file_size: int, model: str) -> HeaderColumns:
    """As `parse_header`, without an object for each tensor.

    Fine-tunes have the headers of their base, byte for byte: then these are the same columns.

    Raises:
        CorruptFileError: as `parse_header`.
    """
    columns = columns_at_once(raw, file_size)
    if columns is not None:
        return columns
    refs = _checked_one_by_one(raw, path, file_size, model)
    fields = [*zip(*refs, strict=True)] or [()] * 6
    names, _, dtypes, shapes, offsets, sizes, *_ = map(tuple, fields)
    return HeaderColumns(names, dtypes, shapes, offsets, sizes, raw)


def refs_of(columns: HeaderColumns, paths: Iterable[Path], model: str) -> Iterator[TensorRef]:
    """Every tensor.

    Args:
        paths: the file of each; there may be more.
    """
    rows = zip(
        columns.names,
        paths,
        columns.dtypes,
        columns.shapes,
        columns.offsets,
        columns.sizes,
        repeat(model),
        strict=False,  # `repeat` never ends
    )
    return map(partial(tuple.__new__, TensorRef), rows)


def _checked_one_by_one(raw: bytes, path: Path, file_size: int, model: str) -> list[TensorRef]:
    """What is out of order, or does not hold: then the error names the tensor."""

    def corrupt(message: str, tensor: str = "") -> CorruptFileError:
        return CorruptFileError(message, model=model, file=path.name, tensor=tensor, hint=_AGAIN)

    length = struct.unpack("<Q", raw[:8])[0]
    if len(raw) < 8 + length:
        raise corrupt(f"truncated: a header of {length} bytes, {len(raw) - 8} of them present")
    try:
        entries = load_unique(raw[8 : 8 + length])
    except (ValueError, RecursionError) as error:
        raise corrupt(f"its header is not valid JSON: {error}") from None
    if not isinstance(entries, dict):
        raise corrupt("its header is not a mapping")
    metadata = entries.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(
        isinstance(item, str) for item in metadata.values()
    ):
        raise corrupt("its __metadata__ is not a mapping of texts")
    data_start = 8 + length
    refs = [_entry(name, e, path, data_start, model, corrupt) for name, e in entries.items()]
    refs.sort(key=attrgetter("offset", "nbytes"))
    end = data_start
    for ref in refs:
        stop = ref.offset + ref.nbytes
        if stop > file_size:
            missing = max(r.offset + r.nbytes for r in refs) - file_size
            raise corrupt(f"truncated: the last {missing} bytes are not there", ref.name)
        if ref.offset != end:
            kind = "overlaps the tensor before it" if ref.offset < end else "leaves a gap before it"
            raise corrupt(f"its place in the file {kind}", ref.name)
        end = stop
    if end != file_size:
        raise corrupt(f"{file_size - end} bytes at its end belong to no tensor")
    return refs


_ENTRY = ("dtype", "shape", "data_offsets")
_AGAIN = "Download or copy the file again."


def _entry(
    name: str, entry: Any, path: Path, data_start: int, model: str, corrupt: Any
) -> TensorRef:
    fields = (entry.get(key) for key in _ENTRY) if isinstance(entry, dict) else (None,) * 3
    dtype, listed, offsets = fields
    if dtype is None or not isinstance(listed, list) or not isinstance(offsets, list):
        raise corrupt("its header entry lacks dtype, shape or data_offsets", name)
    shape = tuple(listed)
    fits = len(offsets) == 2 and len(shape) <= MAX_DIMENSIONS
    if not fits or any(type(n) is not int or not 0 <= n < MAX_NUMBER for n in (*shape, *offsets)):
        raise corrupt(f"impossible shape {_cut(listed)} or offsets {_cut(offsets)}", name)
    start, stop = offsets
    if stop < start:
        raise corrupt(f"impossible shape {_cut(listed)} or offsets {_cut(offsets)}", name)
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise corrupt(f"unknown dtype {_cut(dtype)!r}", name)
    dtype, shape, nbytes = alike(dtype, shape)
    if stop - start != nbytes:
        message = f"{stop - start} bytes for {dtype} of shape {listed}"
        raise corrupt(f"{message}: the header contradicts itself", name)
    if CONTROL.search(name):
        raise corrupt(f"a name that is not text: {_cut(name)!r}")
    # Every source has the same names: one string serves them all.
    return TensorRef(sys.intern(name), path, dtype, shape, data_start + start, nbytes, model)


def _cut(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
