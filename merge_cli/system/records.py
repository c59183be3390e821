"""Records of finished work on disk: lines with a checksum, so that a killed process resumes.

    {"unit":7,"stats":{...},"crc":"90ab12cd"}

The first line of a journal is the key of the work. A bit that flips, a line that was cut short, or
two that have run into one another are noticed; what such a line says, and all that follows it, is
done again. Lines survive the death of the process. After a crash of the machine itself (another
boot) what they say may not have reached the disk, and is not believed unless somebody has waited
for it. A sealed record is still JSON, for whoever wants to read it. Imports nothing heavy.
"""

from __future__ import annotations

import json
import os
import threading
import zlib
from pathlib import Path
from typing import Any

from merge_cli.system.raw_io import replace_file, write_error
from merge_cli.system.untrusted import MAX_JSON, Unreadable, parse_json, read_bytes

Entry = dict[str, Any]
_LIMIT = 2**33  # bytes: no journal comes near


class Records:
    """An append-only file; safe to write from several threads.

    Args:
        path: the file.
        key: of the work. A file of another key is begun anew: ask `key_of` first.
        inputs: what tells the files apart that the work is over (`Inputs.fingerprint`); likewise.
        durable: every line is on the disk when `append` returns, and so is what it tells of.

    Attributes:
        entries: from earlier runs, as far as they may be believed; without the key.

    Raises:
        ResourceError: it cannot be written.
    """

    def __init__(self, path: Path, key: str, inputs: str = "", *, durable: bool = False) -> None:
        self._path, self.key, self._inputs, self._durable = path, key, inputs, durable
        self._mutex = threading.Lock()
        try:
            length, same_boot, entries = self._read()
            self.entries = self._believed(entries, same_boot=same_boot or durable)
            if not length or not (same_boot or durable):  # new, or what another boot may believe
                lines = [{"key": key, "inputs": inputs, "boot": boot_id()}, *self.entries]
                length = replace_file(path, b"".join(map(seal, lines)))
            self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            os.ftruncate(self._fd, length)  # drops what was torn, and what came after it
            os.lseek(self._fd, 0, os.SEEK_END)
        except OSError as error:
            raise write_error(error, path) from error

    @staticmethod
    def key_of(path: Path) -> str | None:
        """The key of the work that a file is of; None where it is absent, or its start torn."""
        key = _first(path).get("key")
        return key if isinstance(key, str) else None

    @staticmethod
    def is_of(path: Path, key: str, inputs: str) -> bool:
        """Whether a file is of this work over these inputs."""
        first = _first(path)
        return (first.get("key"), first.get("inputs")) == (key, inputs)

    @staticmethod
    def count_of(path: Path) -> int:
        """Lines after the first that hold."""
        return max(0, len(_lines(path)[0]) - 1)

    def append(self, entry: Entry) -> None:
        """Add a line.

        Raises:
            ResourceError: it cannot be written.
        """
        data = seal(entry)
        try:
            with self._mutex:
                while data:
                    data = data[os.write(self._fd, data) :]
                if self._durable:
                    os.fsync(self._fd)
        except OSError as error:
            raise write_error(error, self._path) from error

    def close(self) -> None:
        """Close the file; nothing is buffered, so that nothing can fail here."""
        os.close(self._fd)

    def _believed(self, entries: list[Entry], *, same_boot: bool) -> list[Entry]:
        """What may be believed of these lines."""
        return entries if same_boot else []

    def _read(self) -> tuple[int, bool, list[Entry]]:
        """Bytes of whole lines of this work, whether they are of this boot, and what they say."""
        entries, length = _lines(self._path)
        first = entries[0] if entries else {}
        if (first.get("key"), first.get("inputs")) != (self.key, self._inputs):
            return 0, False, []
        return length, first.get("boot") == boot_id(), entries[1:]


def _lines(path: Path) -> tuple[list[Entry], int]:
    try:
        return read_lines(read_bytes(path, limit=_LIMIT))
    except Unreadable:
        return [], 0


def _first(path: Path) -> Entry:
    """The first line; empty where it is absent, or torn."""
    try:
        with path.open("rb") as file:
            return unseal(file.readline(1 << 20)) or {}
    except OSError:
        return {}


def boot_id() -> str:
    """Identifies this boot of the machine; empty where the system does not tell (macOS)."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""


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
        json = parse_json(body + b"}")
    except Unreadable:
        return None
    return json if isinstance(json, dict) else None


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
    lines, length = [], 0
    for line in content.splitlines(keepends=True):
        entry = unseal(line)
        if entry is None:
            break
        lines.append(entry)
        length += len(line)
    return lines, length
