"""The bytes of a GGUF header: keys with their types, and what tensors there are."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

from merge_cli.formats.gguf.header import (
    ARRAY,
    BOOL,
    DEFAULT_ALIGNMENT,
    FLOAT32,
    INT32,
    MAGIC,
    STRING,
    UINT32,
    BlockTensor,
    padded,
)


def header_bytes(values: Mapping[str, Any], tensors: Sequence[BlockTensor]) -> bytes:
    """A header up to the data; where the tensors lie follows from their order."""
    parts = [MAGIC, struct.pack("<IQQ", 3, len(tensors), len(values))]
    for key, value in values.items():
        parts += [_text(key), _value(value)]
    end = 0
    for tensor in tensors:
        start = padded(end, DEFAULT_ALIGNMENT)
        parts += [_text(tensor.name), struct.pack("<I", len(tensor.shape))]
        parts.append(struct.pack(f"<{len(tensor.shape)}Q", *reversed(tensor.shape)))
        parts.append(struct.pack("<IQ", tensor.kind.number, start))
        end = start + tensor.nbytes
    raw = b"".join(parts)
    return raw + bytes(padded(len(raw), DEFAULT_ALIGNMENT) - len(raw))


def _text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any) -> bytes:
    """A value with its type before it."""
    if isinstance(value, bool):
        return struct.pack("<I?", BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", UINT32, value)
    if isinstance(value, float):
        return struct.pack("<If", FLOAT32, value)
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _text(value)
    if isinstance(value[0], str):
        texts = b"".join(map(_text, value))
        return struct.pack("<IIQ", ARRAY, STRING, len(value)) + texts
    kind, code = (FLOAT32, "f") if isinstance(value[0], float) else (INT32, "i")
    return struct.pack(f"<IIQ{len(value)}{code}", ARRAY, kind, len(value), *value)
