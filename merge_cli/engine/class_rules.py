"""What a class of transformers says of its tensors, looked up by the name in config.json.

Only classes that transformers itself brings are looked at, and nothing of them is run: three class
attributes are read. It takes seconds to import them, so ask only when a tensor is lacking.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}")


@dataclass(frozen=True)
class ClassRules:
    """What loading does about names.

    Attributes:
        skipped: patterns of tensors that loading skips where a file has them.
        computed: patterns of tensors that the model has and does not miss in a file.
        tied: pattern of a tensor -> the tensor that it is tied to.
    """

    skipped: tuple[re.Pattern[str], ...] = ()
    computed: tuple[re.Pattern[str], ...] = ()
    tied: tuple[tuple[re.Pattern[str], str], ...] = field(default=())

    def may_lack(self, name: str) -> bool:
        """Whether a file may be without a tensor."""
        return any(pattern.search(name) for pattern in (*self.skipped, *self.computed))

    def tied_to(self, name: str) -> str | None:
        """The tensor that one is tied to."""
        for pattern, other in self.tied:
            found = pattern.match(name)
            if found:
                return other + name[found.end() :]
        return None


def class_rules(config: Mapping[str, Any]) -> ClassRules:
    """The rules of a config's first architecture; empty where transformers does not know it."""
    listed = config.get("architectures")
    name = listed[0] if isinstance(listed, list) and listed else None
    return _rules(name) if isinstance(name, str) and _NAME.fullmatch(name) else ClassRules()


@lru_cache(maxsize=64)
def _rules(name: str) -> ClassRules:
    try:
        import transformers

        found = getattr(transformers, name, None)
    except (ImportError, AttributeError, RuntimeError):
        return ClassRules()  # a class whose own requirements are not installed
    if not isinstance(found, type):
        return ClassRules()
    tied = getattr(found, "_tied_weights_keys", None)
    pairs = tied.items() if isinstance(tied, dict) else ()  # before version 5 a list, without whose
    return ClassRules(
        _patterns(getattr(found, "_keys_to_ignore_on_load_unexpected", None)),
        _patterns(getattr(found, "_keys_to_ignore_on_load_missing", None)),
        tuple((re.compile(key), other) for key, other in pairs if isinstance(other, str)),
    )


def _patterns(listed: Any) -> tuple[re.Pattern[str], ...]:
    words: Iterable[str] = sorted(listed) if isinstance(listed, set) else (listed or ())
    return tuple(re.compile(word) for word in words)
