"""The files of a distributed checkpoint, by which it is known."""

from __future__ import annotations

from collections.abc import Iterable

METADATA = ".metadata"
NAMES = "names.yaml"  # beside it: what the names of its tensors become


def is_checkpoint(names: Iterable[str]) -> bool:
    """Whether a folder with these files is a distributed checkpoint."""
    listed = set(names)
    return METADATA in listed and any(name.endswith(".distcp") for name in listed)
