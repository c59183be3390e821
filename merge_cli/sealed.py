"""Records that our own programs read back: JSON that carries a checksum over itself.

    {"unit":7,"stats":{...},"crc":"90ab12cd"}

One bit that flips, a line that was cut short, or two that have run into one another are noticed,
and what does not hold is as good as absent: it is done again. A sealed record is still JSON, for
whoever wants to read it. Imports nothing heavy.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

from merge_cli.guarded import MAX_JSON, Unreadable, parse_json, read_bytes

_MARK = b',"crc":"'
_TAIL = len(_MARK) + 8 + len(b'"}')  # the checksum is eight hexadecimal digits


def seal(entry: dict[str, Any]) -> bytes:
    """One line, newline included."""
    text = json.dumps(entry, separators=(",", ":"), ensure_ascii=False)
    body = text.encode("utf-8", "backslashreplace")[:-1] if entry else b'{"empty":true'
    return body + _MARK + f'{zlib.crc32(body):08x}"}}\n'.encode()


def unseal(line: bytes) -> dict[str, Any] | None:
    """What was sealed, without its checksum; None where the line is not what was written."""
    if not line.endswith(b'"}\n') or len(line) <= _TAIL + 1:
        return None
    body, tail = line[: -_TAIL - 1], line[-_TAIL - 1 :]
    if tail != _MARK + f'{zlib.crc32(body):08x}"}}\n'.encode():
        return None
    try:
        found = parse_json(body + b"}")
    except Unreadable:
        return None
    return found if isinstance(found, dict) else None


def read_sealed(path: Path) -> dict[str, Any] | None:
    """A file that is one sealed record; None where it is absent, or not what was written."""
    try:
        return unseal(read_bytes(path, limit=MAX_JSON))
    except Unreadable:
        return None


def read_lines(content: bytes) -> tuple[list[dict[str, Any]], int]:
    """Sealed lines up to the first that does not hold: what follows it is done again, too.

    Returns:
        the entries, and the length of their lines in bytes.
    """
    found, length = [], 0
    for line in content.splitlines(keepends=True):
        entry = unseal(line)
        if entry is None:
            break
        found.append(entry)
        length += len(line)
    return found, length
