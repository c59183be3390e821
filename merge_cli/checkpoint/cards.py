"""Model cards: the metadata at the head of README.md.

A card only describes: one that cannot be read gives a note, and is no reason not to merge.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from merge_cli.checkpoint.auxiliary_files import CARD
from merge_cli.system.untrusted import Unreadable, read_text
from merge_cli.system.untrusted_yaml import read_front

_FRONT = re.compile(r"\A\ufeff?---\r?\n(.*?)\r?\n---\r?(\n|\Z)", re.DOTALL)
_MAX_CARD = 16 * 2**20


def read_card(folder: Path) -> tuple[dict[str, Any], str]:
    """The metadata of a folder's card, and why it cannot be read; both empty without a card."""
    path = folder / CARD
    try:
        status = path.stat()
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        return {}, "" if missing else f"{CARD} cannot be read: {error.strerror}"
    return _read(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=64)
def _read(path: Path, *_: int) -> tuple[dict[str, Any], str]:
    """Once for each file: the plan, the card and its sentence on licences ask for it."""
    try:
        text = read_text(path, limit=_MAX_CARD)
        result = _FRONT.match(text)
        data = read_front(result[1]) if result else {}
    except Unreadable as error:
        return {}, f"{CARD} {error}"
    return (data, "") if isinstance(data, dict) else ({}, "")


def front_matter(text: str) -> dict[str, Any]:
    """The metadata of a card as text and lists; empty where there is none that can be read.

    Scalars stay text: to YAML the language `no` is a truth value.
    """
    result = _FRONT.match(text)
    if result is None:
        return {}
    try:
        data = read_front(result[1])
    except Unreadable:
        return {}  # of somebody else's card: what it says is unknown
    return data if isinstance(data, dict) else {}
