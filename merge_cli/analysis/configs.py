"""What the files beside the weights say, and where models disagree: config.json and dtypes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merge_cli.checkpoint.source import Source

# They say who wrote the file, or how it was loaded, and nothing of the model.
_ASIDE = frozenset(("_name_or_path", "name_or_path", "transformers_version", "use_cache"))
ABSENT = "(absent)"


@dataclass(frozen=True)
class KeyDifference:
    """A key of config.json, dotted where nested, and what each model says, the base first."""

    key: str
    values: tuple[str, ...]


def config_differences(sources: Sequence[Source]) -> tuple[KeyDifference, ...]:
    """Every key on which the configs differ, in alphabetical order.

    Keys that only say who wrote the file are left out. A key that a config lacks is `(absent)`.
    """
    flat = [dict(_flat(source.config)) for source in sources]
    keys = sorted({key for one in flat for key in one})
    found = []
    for key in keys:
        values = tuple(_text(one[key]) if key in one else ABSENT for one in flat)
        if len(set(values)) > 1:
            found.append(KeyDifference(key, values))
    return tuple(found)


def stored_dtypes(sources: Sequence[Source]) -> tuple[dict[str, int], ...]:
    """For each model, how many tensors are stored in each dtype."""
    return tuple(dict(Counter(ref.dtype for ref in s.tensors.values())) for s in sources)


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if key in _ASIDE:
            continue
        # transformers 5 writes `dtype`, older files say `torch_dtype`.
        name = prefix + ("dtype" if key == "torch_dtype" else str(key))
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{name}.")
        else:
            yield name, value


def _text(value: Any, most: int = 60) -> str:
    text = (
        "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    )
    return text if len(text) <= most else f"{text[: most - 1]}…"
