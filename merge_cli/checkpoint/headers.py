"""Safetensors headers: what is in a file, read from its first kilobytes and checked.

A header is trusted nowhere else, so everything that could make a later read wrong is refused here:
a length beyond the file, spans that overlap, leave gaps or run past the end, sizes that do not
follow from shape and dtype.
"""

from __future__ import annotations

import json
import math
import struct
import sys
from contextlib import suppress
from functools import lru_cache, partial
from itertools import chain, repeat
from operator import attrgetter, itemgetter, sub
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from merge_cli.checkpoint.dtypes import DTYPES, width_of
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

    columns = _columns(raw, file_size)
    if columns is None:
        return _checked_one_by_one(raw, path, file_size, model)
    rows = zip(
        columns.names,
        repeat(path),
        columns.dtypes,
        columns.shapes,
        columns.offsets,
        columns.sizes,
        repeat(model),
        strict=False,  # `repeat` never ends
    )
    return dict(zip(columns.names, map(partial(tuple.__new__, TensorRef), rows), strict=True))


class _Columns(NamedTuple):
    """A header that holds in every point, in the order of the data. See `TensorRef`."""

    names: list[str]
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    offsets: list[int]
    sizes: tuple[int, ...]


@lru_cache(maxsize=256)
def _columns(raw: bytes, file_size: int) -> _Columns | None:
    """All entries at once, each check over a whole column; None where one does not hold.

    Fine-tunes have the header of their base, byte for byte: it is parsed once. A column takes a
    tenth of the time that its entries take one by one, and a large mixture of experts has 100,000.
    """
    data_start = 8 + int(struct.unpack("<Q", raw[:8])[0])
    text = raw[8:data_start]
    try:
        entries = json.loads(text)
        metadata = entries.pop("__metadata__", None) or {}
        values = list(entries.values())
        # As many keys as colons: no key stands twice. See `_load`.
        keys = len(entries) + sum(map(len, values))
        keys += len(metadata) + (b'"__metadata__"' in text)
        fields = [*zip(*map(itemgetter(*_ENTRY), values), strict=True)] or [(), (), ()]
        numbers = list(chain.from_iterable(chain.from_iterable(fields[1:])))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    dtypes, shapes, spans = fields
    if (
        keys != text.count(b":")
        or not {dict} >= {type(metadata), *map(type, values)}
        or not {str} >= {*map(type, metadata.values()), *map(type, dtypes)}
        or not {list} >= {*map(type, shapes), *map(type, spans)}
        or not {int} >= {*map(type, numbers)}
        or not {2} >= {*map(len, spans)}
        or not DTYPES.keys() >= {*dtypes}
        or not 0 <= min(numbers, default=0) <= max(numbers, default=0) < _MAX_NUMBER
        or max(map(len, shapes), default=0) > _MAX_DIMENSIONS
        or not (all_names := "".join(entries)).isprintable()  # asked first: much faster
        and CONTROL.search(all_names)
    ):
        return None
    if not spans:
        return _Columns([], (), (), [], ()) if data_start == file_size else None
    starts, stops = zip(*spans, strict=True)
    stored = map(_stored, dtypes, map(tuple, shapes))
    dtypes, shapes, sizes = zip(*stored, strict=True)
    follows = starts == (0, *stops[:-1]) and (*map(sub, stops, starts),) == sizes
    if not follows or data_start + stops[-1] != file_size:
        return None
    return _Columns(
        list(map(sys.intern, entries)),  # sources of other files, too, have these names
        dtypes,
        shapes,
        list(map(data_start.__add__, starts)),
        sizes,
    )


def _checked_one_by_one(raw: bytes, path: Path, file_size: int, model: str) -> dict[str, TensorRef]:
    """What is out of order, or does not hold: then the error names the tensor."""

    def corrupt(message: str, tensor: str = "") -> CorruptFileError:
        return CorruptFileError(message, model=model, file=path.name, tensor=tensor, hint=_AGAIN)

    length = struct.unpack("<Q", raw[:8])[0]
    if len(raw) < 8 + length:
        raise corrupt(f"truncated: a header of {length} bytes, {len(raw) - 8} of them present")
    try:
        entries = _load(raw[8 : 8 + length])
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
    return {ref.name: ref for ref in refs}


_ENTRY = ("dtype", "shape", "data_offsets")
_MAX_DIMENSIONS = 64  # numpy's limit; torch has the same
_MAX_NUMBER = 2**63  # of any system that counts bytes
_AGAIN = "Download or copy the file again."


def _entry(
    name: str, entry: Any, path: Path, data_start: int, model: str, corrupt: Any
) -> TensorRef:
    fields = (entry.get(key) for key in _ENTRY) if isinstance(entry, dict) else (None,) * 3
    dtype, listed, offsets = fields
    if dtype is None or not isinstance(listed, list) or not isinstance(offsets, list):
        raise corrupt("its header entry lacks dtype, shape or data_offsets", name)
    shape = tuple(listed)
    fits = len(offsets) == 2 and len(shape) <= _MAX_DIMENSIONS
    if not fits or any(type(n) is not int or not 0 <= n < _MAX_NUMBER for n in (*shape, *offsets)):
        raise corrupt(f"impossible shape {_cut(listed)} or offsets {_cut(offsets)}", name)
    start, stop = offsets
    if stop < start:
        raise corrupt(f"impossible shape {_cut(listed)} or offsets {_cut(offsets)}", name)
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise corrupt(f"unknown dtype {_cut(dtype)!r}", name)
    dtype, shape, nbytes = _stored(dtype, shape)
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


@lru_cache(maxsize=4096)
def _stored(dtype: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...], int]:
    """Dtype, shape and bytes: the same objects for the thousands of tensors that are alike."""
    return dtype, shape, math.prod(shape) * width_of(dtype)


def _load(text: bytes) -> Any:
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
