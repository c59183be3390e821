"""Printing untrusted text: names, values and messages may contain anything.

Escape sequences for terminals, and characters that change the direction of text, are printed in
escaped form, so that they have no effect. All consoles of this package are `PlainConsole`s, and all
JSON goes through `print_json`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

# C0 but tab and line feed, DEL, C1; line separators and marks of direction; half surrogates.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")  # fmt: skip  # noqa: E501


def plain(text: str) -> str:
    """The text with control characters in escaped form: `\\x1b[2J`."""
    return _UNSAFE.sub(lambda match: ascii(match[0])[1:-1], text)


class PlainConsole(Console):
    """A console whose colours are the only escape sequences."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Render as rich does, with every text in plain form."""
        for segment in super().render(renderable, options):
            if segment.control or not _UNSAFE.search(segment.text):
                yield segment
            else:
                yield Segment(plain(segment.text), segment.style)


def print_json(text: str) -> None:
    """Print a JSON document to stdout, in characters that stdout can encode and without control
    characters."""
    text = _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
    try:
        text.encode(sys.stdout.encoding)
    except UnicodeEncodeError:
        text = re.sub("[^\x00-\x7f]", lambda match: _json_escape(match[0]), text)
    print(text)


def print_text(text: str) -> None:
    """Print a file's text to stdout; as UTF-8 bytes where stdout cannot encode it."""
    try:
        text.encode(sys.stdout.encoding)
    except UnicodeEncodeError:
        sys.stdout.flush()
        sys.stdout.buffer.write(text.encode("utf-8"))
        sys.stdout.buffer.flush()
    else:
        print(text, end="")


def _json_escape(character: str) -> str:
    """A character as JSON writes it in ASCII: one or two UTF-16 code units."""
    code_units = character.encode("utf-16-be", "surrogatepass")
    return "".join(
        f"\\u{code_units[i]:02x}{code_units[i + 1]:02x}" for i in range(0, len(code_units), 2)
    )
