"""Read untrusted files: each held against bounds of size, depth and digits before it is used.

Every file of a model, an adapter, a recipe or a data set comes through here before it is believed:

    read_bytes, read_text   a regular file (never a device or a pipe) of bounded size
    parse_json              bounded depth and digits, and text that can be written down again
    read_json               both, with an error that names model and file
    whole_number            a number that will be an index, a size or a count

What cannot be understood raises `Unreadable`, a ValueError whose text continues `<file> ...`;
`read_json` raises it as the CorruptFileError that users see. Imports nothing heavy.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from merge_cli.errors import CorruptFileError

# The largest files of the kind in the wild are tokenizer.json of 256,000 tokens (35 MB) and an
# index of 100,000 tensors (12 MB).
MAX_JSON = 256 * 2**20
MAX_TEXT = 64 * 2**20
# The deepest configs in the wild nest seven levels; what we write down again nests as deep.
MAX_DEPTH = 64
# 2**64 has 20 digits and 2**128 39. No number that means anything is longer.
MAX_DIGITS = 40
# What no name, path or number holds. Terminals obey the first of them.
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x80-\x84\x86-\x9f\ud800-\udfff]")


class Unreadable(ValueError):
    """What was read is not what it should be. The text says why, and continues a file's name."""


def read_bytes(path: Path, *, limit: int = MAX_TEXT, pipe: bool = False) -> bytes:
    """The content of a regular file.

    Args:
        limit: the most bytes that the file may have.
        pipe: whatever can be read will do: for what the user names on the command line, as
            `<(...)` of a shell.

    Raises:
        Unreadable: missing, no regular file, too large, or the system refuses.
    """
    fd = _open(path, pipe)
    try:
        with os.fdopen(fd, "rb") as file:
            # Room for as much as there is; then the rest of what is longer than it says.
            content = file.read(min(limit, os.fstat(fd).st_size) + 1)
            content += file.read(limit + 1 - len(content))
    except OSError as error:
        raise Unreadable(f"cannot be read: {error.strerror}") from None
    if len(content) > limit:
        raise Unreadable(f"is larger than {limit // 2**20} MiB, the most that such a file may have")
    return content


def is_file(path: Path) -> bool:
    """Whether a regular file is there; names that no file can have are no error."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def open_regular(path: Path) -> BinaryIO:
    """A regular file, opened for reading, of which the caller reads as much as it has bounded.

    Raises:
        Unreadable: missing, no regular file, or the system refuses.
    """
    return os.fdopen(_open(path, pipe=False), "rb")


def _open(path: Path, pipe: bool) -> int:
    try:
        # A pipe would block at open, a device might never end: both are known only from stat.
        waiting = 0 if pipe else os.O_NONBLOCK
        fd = os.open(path, os.O_RDONLY | waiting | os.O_CLOEXEC)
    except OSError as error:
        raise Unreadable(f"cannot be read: {error.strerror}") from error
    except ValueError:  # a NUL in the name
        raise Unreadable("cannot be read: its name is no file name") from None
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode) or (pipe and not stat.S_ISDIR(mode)):
        return fd
    os.close(fd)
    message = "Is a directory" if pipe else "it is not a regular file"
    raise Unreadable(f"cannot be read: {message}")


def read_text(path: Path, *, limit: int = MAX_TEXT, pipe: bool = False) -> str:
    """The content of a regular UTF-8 file, without a byte order mark.

    Args:
        limit, pipe: as for `read_bytes`.

    Raises:
        Unreadable: as `read_bytes`, or not UTF-8.
    """
    try:
        return read_bytes(path, limit=limit, pipe=pipe).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Unreadable(f"is not UTF-8 text: {error.reason} at byte {error.start}") from None


def parse_json(text: str | bytes) -> Any:
    """JSON as `json.loads` reads it, within bounds.

    Raises:
        Unreadable: not JSON, nested deeper than MAX_DEPTH, a number of more than MAX_DIGITS
            digits, or text that is not Unicode (half of a surrogate pair).
    """
    try:
        plain = text
        if not isinstance(plain, str):
            plain = plain.decode(json.detect_encoding(plain), "surrogatepass")
        # A function for each number takes longer than all the rest: a vocabulary has 150,000.
        alike = plain.encode(errors="surrogatepass").translate(_ALIKE)
        hook = _integer if _LONG_NUMBER in alike else None
        result = json.loads(plain, parse_int=hook)
    except Unreadable:
        raise
    except RecursionError:
        raise Unreadable(f"nests deeper than {MAX_DEPTH} levels") from None
    except (ValueError, MemoryError) as error:  # JSONDecodeError and UnicodeDecodeError are too
        raise Unreadable(f"is not valid JSON: {error}") from None
    _check_depth(result)
    if "\\" in plain and "\\ud" in plain.lower():  # the first look is much the faster one
        try:
            json.dumps(result, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise Unreadable("holds half of a surrogate pair, which is no text") from None
    return result


def plain_json(content: bytes) -> bytes:
    """JSON as UTF-8 without a byte order mark: all that other programs read.

    Raises:
        Unreadable: it is text in none of the encodings of JSON.
    """
    encoding = json.detect_encoding(content[:4])
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        message = f"is not {encoding.upper()} text: {error.reason} at byte {error.start}"
        raise Unreadable(message) from None
    return content if encoding == "utf-8" else text.encode()


def may_hold_no_number(content: bytes) -> bool:
    """Whether JSON seems to hold NaN or Infinity, which only its parsed form tells for certain."""
    if any(pattern.search(content) for pattern in _NO_NUMBERS):
        return True
    alike = content.translate(_ALIKE)
    return any(digits in alike for digits in _TOO_LARGE)


def read_json(
    path: Path,
    model: str = "",
    *,
    limit: int = MAX_JSON,
    parse: Callable[[bytes], Any] = parse_json,
) -> Any:
    """Read a JSON file of a model.

    Args:
        model: the source as the recipe names it, for the message.
        parse: what makes something of the content, and raises Unreadable where it cannot.

    Raises:
        CorruptFileError: see `read_bytes`, `plain_json` and `parse_json`; or it holds NaN, or
            Infinity where that is no open limit (Mamba 2 has one), with its key.
    """
    try:
        content = plain_json(read_bytes(path, limit=limit))
        result = parse(content)
        if may_hold_no_number(content) and (wrong := _first_no_number(result)):
            raise Unreadable(wrong)
        return result
    except Unreadable as error:
        raise CorruptFileError(str(error), model=model, file=path.name) from None


def read_mapping(path: Path, model: str = "", *, limit: int = MAX_JSON) -> dict[str, Any]:
    """Read a JSON file that holds a mapping.

    Raises:
        CorruptFileError: see `read_json`, or it holds something else.
    """
    json = read_json(path, model, limit=limit)
    if not isinstance(json, dict):
        message = f"is not a mapping but {kind_of(json)}"
        raise CorruptFileError(message, model=model, file=path.name)
    return json


def whole_number(value: Any, name: str, *, least: int = 0, most: int) -> int:
    """A number of somebody else's that will be an index, a size or a count.

    Args:
        name: what it is, for the message.
        least, most: the bounds, both included.

    Raises:
        Unreadable: not a whole number (a boolean is none), or out of bounds.
    """
    if type(value) is not int:
        raise Unreadable(f"{name} must be a whole number (got {kind_of(value)})")
    if not least <= value <= most:
        raise Unreadable(f"{name} must be from {least} to {most} (got {value})")
    return value


def kind_of(value: Any) -> str:
    """What a JSON value is, in words: `a list`, `null`, `the text 'abc'`, `the number 3`."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, str):
        return f"the text {value[:40]!r}"
    return "a list" if isinstance(value, list) else "a mapping"


def called(character: str) -> str:
    """What a character that `CONTROL` finds is called."""
    if "\ud800" <= character <= "\udfff":
        return f"half of a surrogate pair (U+{ord(character):04X}), which is no text"
    return f"a control character (U+{ord(character):04X})"


# What numbers are made of, alike: finding fixed bytes takes a tenth of the time of a pattern that
# looks at every digit of a vocabulary.
_ALIKE = bytes.maketrans(b"123456789.E", b"0000000000e")
_LONG_NUMBER = b"0" * (MAX_DIGITS + 1)


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise Unreadable(f"holds a number of {len(digits)} digits")
    return int(digits)


# As Python's JSON spells them, outside of texts; and numbers too large for a float, as `_ALIKE`.
_NO_NUMBERS = (
    re.compile(rb"NaN(?=\s*(?:[,\]}]|\Z))"),
    re.compile(rb"Infinity(?=\s*(?:[,\]}]|\Z))"),
)
# With two digits of an exponent it takes 200 before it.
_TOO_LARGE = (b"0e000", b"0e+000", b"0" * 200)
_OPEN = re.compile("limit|max|min")  # keys whose value bounds others: no bound is Infinity
_NESTING = {list, dict}


def _first_no_number(json: Any) -> str:
    """Which value is NaN or Infinity, by its key path; empty where none is."""
    waiting = [("", "", json)]
    while waiting:
        path, key, value = waiting.pop()
        if isinstance(value, dict):
            waiting += [(f"{path}.{k}" if path else k, k, part) for k, part in value.items()]
        elif isinstance(value, list):
            waiting += [(f"{path}[{i}]", key, part) for i, part in enumerate(value)]
        elif isinstance(value, float) and value != value:
            return f"{path or 'it'} is NaN, which is no number"
        elif isinstance(value, float) and math.isinf(value) and not _OPEN.search(key):
            return f"{path or 'it'} is infinite"
    return ""


def _check_depth(openings: Any) -> None:
    """Level by level, so that neither depth nor size costs recursion."""
    level = [openings] if isinstance(openings, list | dict) else []
    for _ in range(MAX_DEPTH):
        if not level:
            return
        children = [item.values() if isinstance(item, dict) else item for item in level]
        level = [
            child
            for some in children
            if not _NESTING.isdisjoint(map(type, some))  # 100,000 names of files hold nothing
            for child in some
            if isinstance(child, list | dict)
        ]
    if level:
        raise Unreadable(f"nests deeper than {MAX_DEPTH} levels")
