"""What a config says about single layers, rewritten for stacked layers.

Configs say which layer is of which kind in several forms; each follows its layers:

    layer_types: [full, sliding, ...]     one entry for each layer; hybrid_override_pattern: "M-M*"
    attn_layer_indices: [1, 3]            numbers of layers
    first_k_dense_replace: 1              how many of the first, or of the last, are different
    moe_layer_start_index, ..end_index    from where to where
    attn_layer_period: 8                  every n-th layer: a rule that has no other form

A rule that cannot say what the stacked layers are is a *doubt*. The layers may follow it all the
same (eight layers of a period of eight, twice); planning/structure.py asks the model class.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MAX_LAYERS = 100_000  # no model has nearly as many; a config that says more is not believed
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")

# One entry for each layer, though a few may follow that are for layers behind them.
_LISTED = (
    "layer_types",
    "mlp_layer_types",
    "layers_block_type",
    "no_rope_layers",
    "attention_layers",
    "moe_layer_freq",
)
# Numbers of layers; keys that look like it are read alike.
_NUMBERED = re.compile(
    r"^(?!no_rope_layers$)(\w*_)?(layers?|blocks?|attn|attention|moe|mlp|dense|sparse|hybrid|global|full)_"
    r"(\w+_)?(ids?|idxs?|index(es)?|indices|enum)$|^(?!no_rope_|attention_layers$)\w+_layers(_enum)?$"
)
_FIRST = (
    "first_k_dense_replace",
    "num_dense_layers",
    "n_dense_layers",
    "num_first_full_attention_layers",
)
_LAST = ("num_kv_shared_layers", "num_last_full_attention_layers")
_EVERY = (
    "attn_layer_period",
    "expert_layer_period",
    "interleave_moe_layer_step",
    "moe_layer_freq",
    "full_attention_interval",
    "no_rope_layer_interval",
    "global_attn_every_n_layers",
    "cross_attention_frequency",
    "dense_attention_every_n_layers",
    "sliding_window_pattern",
)
# A rule for every n-th layer, and the lists that say the same and win over it.
_SAID_BY = {
    "full_attention_interval": ("layer_types",),
    "sliding_window_pattern": ("layer_types",),
    "interleave_moe_layer_step": ("moe_layers",),
    "no_rope_layer_interval": ("no_rope_layers",),
    "global_attn_every_n_layers": ("layer_types",),
    "attn_layer_period": ("layers_block_type",),
    "cross_attention_frequency": ("cross_attention_layers",),
}
_SPAN = ("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval")


@dataclass(frozen=True)
class StackedLayers:
    """Layers of an output.

    Attributes:
        config: the part of the config source's config that describes them; rewritten in place.
        layers: for each, the same part of its source's config, and its number there.
        before: how many layers the config source has.
    """

    config: dict[str, Any]
    layers: Sequence[tuple[Mapping[str, Any], int]]
    before: int | None

    @property
    def in_place(self) -> bool:
        """Whether every layer is where it was."""
        return [index for _, index in self.layers] == list(range(len(self.layers)))

    def where(self, holds: Callable[[Mapping[str, Any], int], bool]) -> list[int]:
        """The output's layers whose own layer is one of which something holds."""
        return [out for out, (source, index) in enumerate(self.layers) if holds(source, index)]

    def count_of(self, source: Mapping[str, Any]) -> int:
        """How many layers a source has."""
        counts = (source.get(key) for key in LAYER_COUNTS)
        return next((count for count in counts if type(count) is int), self.before or 0)

    def put(self, key: str, value: Any) -> bool:
        """Set a key; whether that changed it."""
        changed = self.config.get(key) != value
        self.config[key] = value
        return bool(changed)


def stack_layers(stacked: StackedLayers) -> tuple[list[str], list[str]]:
    """Rewrite everything in a config that counts, lists or numbers layers.

    Returns:
        one line for each change, and one for each rule that may not hold any more.
    """
    changes: list[str] = []
    doubts: list[str] = []
    for key in LAYER_COUNTS:
        count = stacked.config.get(key)
        if type(count) is int and stacked.put(key, len(stacked.layers)):
            changes.append(f"{key}: {count} -> {len(stacked.layers)}")
    experts = {"decoder_sparse_step", "mlp_only_layers"} & stacked.config.keys()
    for key in list(stacked.config):
        if key not in experts and _list_or_numbers(stacked, key):
            changes.append(f"{key}: follows the layers")
    if experts and _sparse_layers(stacked):
        changes.append("mlp_only_layers: follows the layers")
    for key, new, doubt in (*_ends(stacked), *_spans(stacked)):
        if doubt:
            doubts.append(doubt)
            continue
        old = stacked.config.get(key)
        if stacked.put(key, new):
            changes.append(f"{key}: {old} -> {new}")
    doubts += _periods(stacked)
    return changes, doubts


def _list_or_numbers(stacked: StackedLayers, key: str) -> bool:
    """Rewrite a key that lists layers, or numbers of layers; whether it changed."""
    value, before = stacked.config[key], stacked.before
    if before is None or not isinstance(value, list | str) or "token" in key:
        return False
    if key == "attention_types":  # GPT-Neo: [[[kinds], how often], ...]
        listed = _spelled_out(value)
        if listed is None or len(listed) != before:
            return False
        return stacked.put(
            key, [[[_entry(stacked, key, listed, *item) for item in stacked.layers], 1]]
        )
    if key == "block_types" and isinstance(value, list) and value:
        return _repeated(stacked, key, value)
    if _NUMBERED.match(key) and key not in _LISTED:
        return _numbers(stacked, key, value)
    if isinstance(value, str):
        if key.endswith("pattern") and len(value) == before:
            moved = [_entry(stacked, key, list(value), *layer) for layer in stacked.layers]
            return stacked.put(key, "".join(moved))
        return False
    if key == "architectures" or not (
        len(value) == before or (key in _LISTED and len(value) > before)
    ):
        return False
    return stacked.put(key, [_entry(stacked, key, value, *layer) for layer in stacked.layers])


def _repeated(stacked: StackedLayers, key: str, value: list[Any]) -> bool:
    """A list that begins again as often as it must (RecurrentGemma)."""
    kinds = []
    for source, index in stacked.layers:
        entries = source.get(key) or value
        kinds.append(entries[index % len(entries)])
    fits = kinds == [value[i % len(value)] for i in range(len(kinds))]
    return not fits and stacked.put(key, kinds)


def _entry(
    stacked: StackedLayers, key: str, fallback: list[Any], source: Mapping[str, Any], index: int
) -> Any:
    """A layer's entry in its own source's list, or in the config source's."""
    entries = source.get(key)
    if key == "attention_types":
        entries = _spelled_out(entries)
    values = entries if isinstance(entries, list | str) and len(entries) > index else fallback
    return values[index] if index < len(values) else values[-1]


def _spelled_out(types: Any) -> list[Any] | None:
    """GPT-Neo's repeated kinds, one for each layer; None where it is something else."""
    if not isinstance(types, list):
        return None
    result: list[Any] = []
    for part in types:
        if not (
            isinstance(part, list)
            and len(part) == 2
            and isinstance(part[0], list)
            and type(part[1]) is int
            and 0 <= part[1] <= 1000
        ):
            return None
        result += part[0] * part[1]
        if len(result) > MAX_LAYERS:
            return None
    return result


def _numbers(stacked: StackedLayers, key: str, value: Any) -> bool:
    """A list (or text, with commas) of layers' numbers; whether it changed."""
    numbers = _as_numbers(value)
    if numbers is None or not all(0 <= number < (stacked.before or 0) for number in numbers):
        return False

    def holds(source: Mapping[str, Any], index: int) -> bool:
        listed = _as_numbers(source.get(key))
        return index in (numbers if listed is None else listed)

    result = stacked.where(holds)
    return stacked.put(key, ",".join(map(str, result)) if isinstance(value, str) else result)


def _as_numbers(value: Any) -> list[int] | None:
    if isinstance(value, str):
        parts = value.split(",") if value else []
        fits = all(len(p) < 10 and p.strip().isdecimal() for p in parts)
        return [int(p) for p in parts] if fits else None
    if not isinstance(value, list) or any(type(number) is not int for number in value):
        return None
    return value if len(set(value)) == len(value) else None


def _sparse_layers(stacked: StackedLayers) -> bool:
    """Which layers have experts as Qwen-MoE says it: every n-th, but for some."""

    def dense(source: Mapping[str, Any], index: int) -> bool:
        step = source.get("decoder_sparse_step") or 1
        return index in (source.get("mlp_only_layers") or []) or (index + 1) % step != 0

    result = stacked.where(dense)
    config = stacked.config
    if config.get("decoder_sparse_step", 1) == 1 and result == (
        config.get("mlp_only_layers") or []
    ):
        return False
    config |= {"decoder_sparse_step": 1, "mlp_only_layers": result}
    return True


def _ends(stacked: StackedLayers) -> Iterator[tuple[str, int, str]]:
    """How many of the first, or of the last, layers are different: key, number, doubt."""
    total = len(stacked.layers)
    for key in (*_FIRST, *_LAST):
        stated = stacked.config.get(key)
        if type(stated) is not int or (not stated and stacked.in_place):
            continue

        def holds(
            source: Mapping[str, Any], index: int, key: str = key, stated: int = stated
        ) -> bool:
            count = source.get(key)
            count = count if type(count) is int else stated
            return index < count if key in _FIRST else index >= stacked.count_of(source) - count

        result = stacked.where(holds)
        first = key in _FIRST
        expected = range(len(result)) if first else range(total - len(result), total)
        if result != list(expected):
            if key == "first_k_dense_replace" and "mlp_layer_types" in stacked.config:
                continue  # the list says it, and has followed
            kind = "dense" if "dense" in key else "different"
            where = "first" if first else "last"
            yield key, stated, f"its {kind} layers must come {where} ({key})"
        else:
            yield key, len(result), ""


def _spans(stacked: StackedLayers) -> Iterator[tuple[str, int, str]]:
    """Ernie's experts: every n-th layer between two."""
    if not any(type(stacked.config.get(key)) is int for key in _SPAN[:2]):
        return

    def holds(source: Mapping[str, Any], index: int) -> bool:
        start, end, step = (
            number if type(number := source.get(key, stacked.config.get(key))) is int else default
            for key, default in zip(_SPAN, (1, -1, 1), strict=True)
        )
        end = stacked.count_of(source) - 1 if end == -1 else end
        return start <= index <= end and (index + 1) % max(1, step) == 0

    result = stacked.where(holds)
    if not result:  # a span that is empty
        found_span, step = (len(stacked.layers), len(stacked.layers) - 1), 1
    else:
        steps = {b - a for a, b in zip(result, result[1:], strict=False)} or {1}
        step = steps.pop()
        if steps or (result[0] + 1) % step:
            yield _SPAN[0], 0, f"its layers with experts follow no rule ({', '.join(_SPAN)})"
            return
        found_span = result[0], result[-1]
    for key, new in zip(_SPAN, (*found_span, step), strict=True):
        old = stacked.config.get(key)
        last = len(stacked.layers) - 1
        same = key == _SPAN[1] and old in (-1, None) and new == last
        same = same or (key == _SPAN[2] and old is None and new == 1)
        if not same:
            yield key, new, ""


def _periods(stacked: StackedLayers) -> list[str]:
    """Rules for every n-th layer that stacked layers may break."""
    if stacked.in_place:
        return []
    result = []
    for key in _EVERY:
        step = stacked.config.get(key)
        is_stated = any(
            isinstance(stacked.config.get(name), list) for name in _SAID_BY.get(key, ())
        )
        if type(step) is int and step > 1 and not is_stated:
            result.append(f"config.json says by position which layers are which ({key}: {step})")
    return result
