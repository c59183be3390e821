"""Commands that a message or a page shows, so that they work where they are pasted."""

from __future__ import annotations

import shlex


def command(*words: object) -> str:
    """`merge-cli` with these words, each quoted where a shell would split it."""
    return shlex.join(["merge-cli", *map(str, words)])
