"""Lines for a terminal that wrap between words."""

from __future__ import annotations

import re
from itertools import pairwise

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

_WORD = re.compile(r"\S+(?: %\S*)?\s*")  # a share keeps its unit
# A line's value, without quotes and `#`, and its comment.
_COMMENT = re.compile(r"""(?P<indent>[ ]*)(?P<value>(?:[^\s#"'][^#"']*[ ])?)\#[ ](?P<comment>.+)""")


def print_wrapped(console: Console, markup: str, indent: int = 0) -> None:
    """Print a line. In a terminal it wraps between words, so that paths can be copied.

    Args:
        indent: spaces before it, and before what is wrapped.
    """
    line, before = Text.from_markup(markup, emoji=False), Text(" " * indent)
    if console.soft_wrap:
        console.print(before + line)
        return
    for paragraph in line.split("\n", allow_blank=True):
        for part in paragraph.divide(_line_starts(paragraph.plain, console.width - indent)):
            part.rstrip()
            console.print(before + part, soft_wrap=True)


def fold_comments(text: str, width: int) -> str:
    """YAML whose comments fit a width: it means the same, and can be copied from a terminal.

    Long comments become several. One that ends a long line moves above it. Values are never broken.
    """
    lines: list[str] = []
    for line in text.splitlines():
        match = None if cell_len(line) <= width else _COMMENT.match(line)
        if match is None:
            lines.append(line)
            continue
        indent = match["indent"]
        start = f"{indent}# "
        comment = match["comment"]
        for first, end in pairwise([0, *_line_starts(comment, width - len(start)), len(comment)]):
            lines.append(start + comment[first:end].rstrip())
        if match["value"]:
            lines.append(indent + match["value"].rstrip())
    return "\n".join(lines)


def _line_starts(text: str, width: int) -> list[int]:
    """Where lines after the first begin, if no word is broken."""
    starts, filled = [], 0
    for match in _WORD.finditer(text):
        if filled and filled + cell_len(match[0].rstrip()) > width:
            starts.append(match.start())
            filled = 0
        filled += cell_len(match[0])
    return starts
