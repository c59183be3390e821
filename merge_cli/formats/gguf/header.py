"""The header of a GGUF file: key-value pairs and a table of tensors, checked against the file.

    GGUF  version  tensors  pairs | key  type  value ... | name  sizes  type  offset ... | data

As in `checkpoint.headers`, everything that could make a later read wrong is refused here. The
format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Offsets are held against one
another as strictly as llama.cpp does: tensors follow each other, with padding alone between them.
"""

from __future__ import annotations

import math
import os
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from merge_cli.errors import CorruptFileError, SourceError
from merge_cli.formats.gguf.blocks import BLOCK_TYPES, NAMES, BlockType
from merge_cli.system.untrusted import CONTROL, Unreadable, open_regular

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32
_VERSIONS = (2, 3)  # 1 counted in 32 bits; no file of it is left
_MAX_HEADER = 256 * 2**20  # a vocabulary of 256,000 tokens with its merges takes 12 MB
_MAX_PAIRS = 10_000
_MAX_TENSORS = 1_000_000
_MAX_KEY = 2**16 - 1  # the format's own limit
_MAX_LISTED = 10_000_000  # elements of all lists; of that vocabulary there are a million
_MAX_NAME = 255
_MAX_DIMENSIONS = 4  # ggml's
_MAX_SIZE = 2**48  # elements along a dimension
_MAX_ALIGNMENT = 2**20
# Types of values, as the format numbers them.
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
# Type -> struct's code of a number.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}
_MAX_FACTORS = 2**16  # bytes
# Factors of rotary frequencies: those of Llama 3.1, and of Phi 3's long contexts.
ROPE_FACTORS = "rope_freqs.weight"
FACTORS = (ROPE_FACTORS, "rope_factors_long.weight", "rope_factors_short.weight")
_AGAIN = "Download or copy the file again."


class BlockTensor(NamedTuple):
    """A tensor of a file.

    Attributes:
        shape: rows first, as torch has it; the file has the fastest dimension first.
        offset: from the start of the file.
    """

    name: str
    kind: BlockType
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) // self.kind.elements * self.kind.nbytes


@dataclass(frozen=True)
class Header:
    """A file's header.

    Attributes:
        raw: its bytes, up to the data.
        values: the key-value pairs; numbers, truth values, texts, lists of them.
        tensors: in the order of the file.
        factors: of rotary frequencies, the bytes of those tensors: config.json follows from them.
    """

    raw: bytes
    values: Mapping[str, Any]
    tensors: tuple[BlockTensor, ...]
    factors: Mapping[str, bytes] = field(default_factory=dict)


def read_header(path: Path, model: str) -> Header:
    """Read and check the header of a file.

    Raises:
        CorruptFileError: missing, truncated, or contradicting itself; names the key or tensor.
        SourceError: of another version or byte order, or a part of a model that was split.
    """
    try:
        with open_regular(path) as file:
            return parse_header(file, os.fstat(file.fileno()).st_size, path.name, model)
    except (Unreadable, OSError) as error:
        why = f"cannot be read: {error.strerror}" if isinstance(error, OSError) else str(error)
        raise CorruptFileError(why, model=model, file=path.name) from error


def parse_header(file: BinaryIO, size: int, name: str, model: str) -> Header:
    """`read_header` of an opened file.

    Args:
        size: of the file.
        name: of the file, for messages.
    """
    return _Reader(file, size, name, model).header()


class _Reader:
    """Takes a header from a file, never more than its size and `_MAX_HEADER` allow."""

    def __init__(self, file: BinaryIO, size: int, name: str, model: str) -> None:
        self._file, self._size, self._name, self._model = file, size, name, model
        self._position = self._listed = 0
        self._item = ""  # the key or tensor that is being read

    def header(self) -> Header:
        start = self._take(8)
        if start[:4] != MAGIC:
            raise self._corrupt("not a GGUF file: it does not begin with GGUF")
        version = struct.unpack("<I", start[4:])[0]
        if version not in _VERSIONS:
            swapped = struct.unpack(">I", start[4:])[0] in _VERSIONS
            kind = "in big-endian byte order" if swapped else f"of version {version}"
            message = f"a GGUF file {kind}; those of versions 2 and 3 in little-endian are read"
            raise SourceError(message, model=self._model, file=self._name)
        tensors = self._count(_MAX_TENSORS, "tensors")
        pairs = self._count(_MAX_PAIRS, "key-value pairs")
        values: dict[str, Any] = {}
        for _ in range(pairs):
            self._item = ""
            key = self._text(_MAX_KEY)
            if key in values:
                raise self._corrupt(f"the key {_cut(key)} occurs twice")
            self._item = key
            values[key] = self._value(self._number("I"))
        self._item = ""
        table = [self._entry() for _ in range(tensors)]
        self._item = ""
        if values.get("split.count", 1) not in (0, 1):
            message = f"one of {values['split.count']} parts of a model"
            hint = "Join them first: llama-gguf-split --merge FIRST_PART WHOLE.gguf."
            raise SourceError(message, model=self._model, file=self._name, hint=hint)
        alignment = values.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 0 < alignment <= _MAX_ALIGNMENT:
            raise self._corrupt(f"impossible alignment {_cut(alignment)}")
        if alignment & (alignment - 1):
            raise self._corrupt(f"its alignment {alignment} is no power of two")
        data = padded(self._position, alignment)
        placed = self._placed(table, data, alignment)
        self._file.seek(0)
        raw = self._file.read(data)
        return Header(raw, values, placed, self._factors(placed))

    def _factors(self, tensors: tuple[BlockTensor, ...]) -> dict[str, bytes]:
        """The bytes of tensors that config.json is made of, not the model."""
        factors = {}
        for tensor in tensors:
            if tensor.name in FACTORS and tensor.nbytes <= _MAX_FACTORS:
                self._file.seek(tensor.offset)
                factors[tensor.name] = self._file.read(tensor.nbytes)
        return factors

    def _placed(
        self, table: list[BlockTensor], data: int, alignment: int
    ) -> tuple[BlockTensor, ...]:
        """The tensors with offsets from the file's start, each where the one before it ends."""
        end, placed, seen = 0, [], set[str]()
        for tensor in table:
            self._item = tensor.name
            if tensor.name in seen:
                raise self._corrupt("its name occurs twice")
            seen.add(tensor.name)
            expected = padded(end, alignment)
            if tensor.offset != expected:
                raise self._corrupt(
                    f"its data begin at {tensor.offset}, and those before it end at {expected}"
                )
            end = tensor.offset + tensor.nbytes
            if data + end > self._size:
                missing = data + end - self._size
                raise self._corrupt(f"truncated: {missing} bytes of it are not there")
            placed.append(tensor._replace(offset=data + tensor.offset))
        self._item = ""
        if self._size - (data + end) >= max(alignment, DEFAULT_ALIGNMENT):
            raise self._corrupt(f"{self._size - data - end} bytes at its end belong to no tensor")
        return tuple(placed)

    def _entry(self) -> BlockTensor:
        """A line of the table, with the offset that it has there."""
        self._item = ""
        name = self._text(_MAX_NAME)
        self._item = name
        if not name or CONTROL.search(name):
            raise self._corrupt("a name that is not text")
        dimensions = self._number("I")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise self._corrupt(f"{dimensions} dimensions, where there may be {_MAX_DIMENSIONS}")
        shape = struct.unpack(f"<{dimensions}Q", self._take(8 * dimensions))[::-1]
        if not all(1 <= length <= _MAX_SIZE for length in shape):
            raise self._corrupt(f"impossible shape {list(shape)}")
        number, offset = struct.unpack("<IQ", self._take(12))
        if number not in BLOCK_TYPES:
            stored_as = NAMES.get(number, f"type {number}")
            message = f"its numbers are stored as {stored_as}, which is not read"
            hint = "Merge the model that the file was made of, or a file in Q8_0 or a K-quant."
            where = {"model": self._model, "file": self._name, "tensor": name}
            raise SourceError(message, **where, hint=hint)
        kind = BLOCK_TYPES[number]
        if shape[-1] % kind.elements:
            message = f"rows of {shape[-1]} elements are no blocks of {kind.elements} ({kind.name})"
            raise self._corrupt(message)
        return BlockTensor(sys.intern(name), kind, shape, offset)

    def _value(self, kind: int) -> Any:
        if kind == ARRAY:
            inner, count = struct.unpack("<IQ", self._take(12))
            if inner == ARRAY:
                raise self._corrupt("a list of lists, which no key has")
            self._listed += count
            if self._listed > _MAX_LISTED:
                raise self._corrupt(f"lists of more than {_MAX_LISTED} values")
            if inner in _NUMBERS:
                code = _NUMBERS[inner]
                width = struct.calcsize(code)
                self._fits(count * width)
                return list(struct.unpack(f"<{count}{code}", self._take(count * width)))
            self._fits(count * (8 if inner == STRING else 1))
            return [self._value(inner) for _ in range(count)]
        if kind == STRING:
            return self._text(_MAX_HEADER)
        if kind == BOOL:
            value = self._take(1)[0]
            if value > 1:
                raise self._corrupt(f"a truth value of {value}")
            return bool(value)
        if kind == FLOAT32:
            return shortest(self._take(4))
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind])
        raise self._corrupt(f"a value of type {kind}, which the format has not")

    def _text(self, most: int) -> str:
        length = self._number("Q")
        if length > most:
            raise self._corrupt(f"a text of {length} bytes, where {most} are the most")
        try:
            return self._take(length).decode()
        except UnicodeDecodeError as error:
            raise self._corrupt(f"a text that is not UTF-8: {error.reason}") from None

    def _count(self, most: int, message: str) -> int:
        count: int = self._number("Q")
        if count > most:
            raise self._corrupt(f"{count} {message}, where {most} are the most")
        return count

    def _number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._take(struct.calcsize(code)))[0]

    def _take(self, length: int) -> bytes:
        self._fits(length)
        self._position += length
        data = self._file.read(length)
        if len(data) < length:
            raise self._corrupt("truncated while it was read")
        return data

    def _fits(self, length: int) -> None:
        end = self._position + length
        if end > self._size:
            raise self._corrupt("truncated: its header ends beyond the file")
        if end > _MAX_HEADER:
            raise self._corrupt(f"a header of more than {_MAX_HEADER // 2**20} MiB")

    def _corrupt(self, message: str) -> CorruptFileError:
        item = _cut(self._item) if self._item else ""
        return CorruptFileError(
            message, model=self._model, file=self._name, tensor=item, hint=_AGAIN
        )


def padded(position: int, alignment: int) -> int:
    """The next position that is a multiple of the alignment."""
    return -(-position // alignment) * alignment


def shortest(raw: bytes) -> float:
    """A float32 as the number with the fewest digits that is stored like it: 1e-05."""
    value: float = struct.unpack("<f", raw)[0]
    if not math.isfinite(value):
        return value
    texts = (f"{value:.{digits}g}" for digits in range(6, 10))
    return next((float(t) for t in texts if struct.pack("<f", float(t)) == raw), value)


def _cut(value: Any) -> str:
    text = str(value)
    return CONTROL.sub("?", text if len(text) <= 100 else f"{text[:100]}...")
