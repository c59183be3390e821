"""Code blocks and commands of the documentation."""

from __future__ import annotations

import re

from tests.support.paths import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str, text: str = README) -> list[str]:
    """The fenced blocks of a page in a language; "" are the ones without."""
    # All fences in one pass: the end of one block must not be read as the start of another.
    found = re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return [body for kind, body in found if kind == language]


def commands_of(text: str) -> list[str]:
    """The `merge-cli` commands that a page shows."""
    return [
        line.partition("#")[0].strip()
        for block in blocks("", text)
        for line in block.splitlines()
        if line.startswith("merge-cli ")
    ]
