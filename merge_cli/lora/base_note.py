"""Whether an adapter is put on the model that it says it is of."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


def base_note(config: Mapping[str, Any], base: str) -> str:
    """A note where an adapter names another base than the one it is applied to; empty if not.

    Args:
        base: as the recipe names it, without a revision.
    """
    named = config.get("base_model_name_or_path")
    if not isinstance(named, str) or not named.strip():
        return ""
    if _short(named) == _short(base):
        return ""
    return f"the adapter says that it is of {named[:200]!r}; it is put on {base!r} here"


def _short(name: str) -> str:
    """A model's name without where it lies: the last part of a path or an id."""
    parts = [part for part in re.split(r"[/\\]", name.strip().lower()) if part not in ("", ".")]
    # The Hub's cache: models--org--name/snapshots/commit
    cached = next((part for part in parts if part.startswith("models--")), None)
    last = cached.rpartition("--")[2] if cached else (parts or [""])[-1]
    # 4-bit copies of the same weights, as unsloth and bitsandbytes name them.
    return re.sub(r"(-unsloth)?-bnb-(4|8)bit$", "", last)
