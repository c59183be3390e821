"""Printing what others have written: names, values and messages may hold anything.

Escape sequences of terminals, and characters that turn the direction of text around, are shown as
what they are and never obeyed. All consoles of this package are `PlainConsole`s, and all JSON goes
through `print_json`.
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
    """The text with everything that a terminal might obey written out: `\\x1b[2J`."""
    return _UNSAFE.sub(lambda found: ascii(found[0])[1:-1], text)


class PlainConsole(Console):
    """A console whose own colours are the only escape sequences."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """As rich does, and every text plain."""
        for segment in super().render(renderable, options):
            if segment.control or not _UNSAFE.search(segment.text):
                yield segment
            else:
                yield Segment(plain(segment.text), segment.style)


def print_json(text: str) -> None:
    """A JSON document to stdout, in characters that stdout has and no terminal obeys."""
    text = _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
    try:
        text.encode(sys.stdout.encoding)
    except UnicodeEncodeError:
        text = re.sub("[^\x00-\x7f]", lambda found: _json_escape(found[0]), text)
    print(text)


def print_text(text: str) -> None:
    """A file's text to stdout, as UTF-8 where stdout cannot show it: what is there is a file."""
    try:
        text.encode(sys.stdout.encoding)
    except UnicodeEncodeError:
        sys.stdout.flush()
        sys.stdout.buffer.write(text.encode("utf-8"))
        sys.stdout.buffer.flush()
    else:
        print(text, end="")


def _json_escape(character: str) -> str:
    """As JSON writes it in ASCII; above the first plane as two halves."""
    units = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2))
