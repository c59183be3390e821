"""A model's card, README.md: what its author says of licence, languages and origin.

It only describes. A card that cannot be read is silent, with the reason for a note, and never a
reason not to merge.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from merge_cli.checkpoint.files import CARD
from merge_cli.guarded import Unreadable, read_text
from merge_cli.guarded_yaml import read_front

_FRONT = re.compile(r"\A\ufeff?---\r?\n(.*?)\r?\n---\r?(\n|\Z)", re.DOTALL)
_MAX_CARD = 16 * 2**20


def read_card(folder: Path) -> tuple[dict[str, Any], str]:
    """The metadata of a folder's card, and why it cannot be read; both empty without a card."""
    path = folder / CARD
    try:
        about = path.stat()
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        return {}, "" if missing else f"{CARD} cannot be read: {error.strerror}"
    return _read(path, about.st_size, about.st_mtime_ns)


@lru_cache(maxsize=64)
def _read(path: Path, *_: int) -> tuple[dict[str, Any], str]:
    """Once for each file: the plan, the card and its sentence on licences ask for it."""
    try:
        text = read_text(path, limit=_MAX_CARD)
        found = _FRONT.match(text)
        data = read_front(found[1]) if found else {}
    except Unreadable as error:
        return {}, f"{CARD} {error}"
    return (data, "") if isinstance(data, dict) else ({}, "")


def front_matter(text: str) -> dict[str, Any]:
    """The metadata of a card as text and lists; empty where there is none that can be read.

    Scalars stay text: to YAML the language `no` is a truth value.
    """
    found = _FRONT.match(text)
    if found is None:
        return {}
    try:
        data = read_front(found[1])
    except Unreadable:
        return {}  # of somebody else's card: what it says is unknown
    return data if isinstance(data, dict) else {}
