"""The keys of an architecture in a GGUF file: read within bounds, and none passed over."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from merge_cli.system.untrusted import Unreadable, whole_number

MAX_WIDTH = 2**31
_COUNTS = ("expert_count", "expert_used_count")
# Keys of an architecture that describe, or that say what the tensors say already.
_WITHOUT_EFFECT = (
    "vocab_size",
    "tensor_data_layout",
    "attention.key_length",
    "attention.value_length",
    "rope.dimension_count",
    "rope.scaling.finetuned",
)
_READ = (
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.layer_norm_rms_epsilon",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
)


class ArchitectureKeys:
    """The keys of an architecture, read within bounds."""

    def __init__(self, values: Mapping[str, Any], prefix: str) -> None:
        self._values, self._prefix = values, prefix

    def number(self, key: str, most: int, default: int | None = None) -> int:
        """A whole number from 1 to `most`; a list of one number for each layer must agree."""
        name = f"{self._prefix}.{key}"
        value = self._values.get(name, default)
        if isinstance(value, list) and value and value.count(value[0]) == len(value):
            value = value[0]
        return whole_number(value, name, least=1, most=most)

    def real(self, key: str, default: float | None = None) -> float:
        """A finite number above 0."""
        name = f"{self._prefix}.{key}"
        value = self._values.get(name, default)
        if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
            raise Unreadable(f"{name} must be a number above 0 (got {str(value)[:60]})")
        return float(value)

    def get(self, key: str) -> Any:
        return self._values.get(f"{self._prefix}.{key}")

    def __contains__(self, key: str) -> bool:
        return f"{self._prefix}.{key}" in self._values

    def unknown(self, more: tuple[str, ...]) -> list[str]:
        """Keys that nobody reads; those that count experts are 0 where there are none."""
        understood = {f"{self._prefix}.{key}" for key in (*_READ, *_WITHOUT_EFFECT, *more)}
        understood |= {f"{self._prefix}.{key}" for key in _COUNTS if not self.get(key)}
        return [k for k in self._values if k.startswith(f"{self._prefix}.") and k not in understood]
