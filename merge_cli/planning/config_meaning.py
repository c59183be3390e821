"""What a config means, key by key, however it is spelt.

Two spellings of one meaning are brought to one form: transformers 4 and 5 write rotary embeddings
differently, and what one config leaves out another may write down.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from merge_cli.checkpoint.config import class_defaults, text_config
from merge_cli.planning.config_keys import ignored_keys

_SPELLINGS = {
    "activation_function": "hidden_act",
    "hidden_activation": "hidden_act",
    "n_head": "num_attention_heads",
    "n_heads": "num_attention_heads",
    "num_heads": "num_attention_heads",
    "n_embd": "hidden_size",
    "d_model": "hidden_size",
    "rotary_pct": "partial_rotary_factor",
}
_ACTIVATIONS = {"swish": "silu"}
# What classes mean that say nothing themselves.
_PLAIN: dict[str, Any] = {
    "partial_rotary_factor": 1.0,
    "attention_bias": False,
    "mlp_bias": False,
    "qkv_bias": False,
    "use_sliding_window": False,
    "is_encoder_decoder": False,
    "is_decoder": False,
    "add_cross_attention": False,
    "tie_encoder_decoder": False,
    "cross_attention_hidden_size": None,
}
FOR_ALL = ("model_type", "tie_word_embeddings")  # of the whole model, wherever they stand


class Meaning:
    """What a config says by key, its language model's keys as if they were its own.

    Args:
        counts_layers: whether the number of layers matters: not where layers are taken from models
            one by one.

    Attributes:
        settings: what it does say, of what matters.
        around: keys of the whole that its language model is a part of.
        hidden: by a description, what one of the two says by a key that both have, and that counts
            for the other.
        is_nested: whether it is a part.
    """

    def __init__(self, config: Mapping[str, Any], *, counts_layers: bool = False) -> None:
        self._text = text_config(config)
        self.is_nested = self._text is not config
        ignored = ignored_keys(config, counts_layers=counts_layers)
        self.settings = _normal(self._text, ignored)
        self.around: frozenset[str] = frozenset()
        self.hidden: dict[str, Any] = {}
        if self.is_nested:
            rest = {key: value for key, value in config.items() if value is not self._text}
            whole = _normal(rest, ignored)
            self.around = frozenset(whole.keys() - self.settings.keys())
            for key in whole.keys() & self.settings.keys():
                if key in FOR_ALL:
                    self.hidden[f"{key} of the language model"] = self.settings[key]
                else:
                    self.hidden[f"{key} of the whole model"] = whole[key]
            self.settings = {**whole, **self.settings}
            self.settings |= {key: whole[key] for key in FOR_ALL if key in whole}
        self._config = config

    def value(self, key: str) -> Any:
        """What it means by a key, whether it says so or not; None where nobody knows."""
        value = self.settings.get(key)
        if value is None and key not in self.settings:
            value = self._default(key)
        return self._implied(key) if value is None else value

    def plain_value(self, key: str) -> Any:
        """The same, or what classes mean that do not have the key.

        Raises:
            KeyError: nobody knows.
        """
        value = self.value(key)
        return value if value is not None or key in self.settings else _PLAIN[key]

    def _implied(self, key: str) -> Any:
        heads, width = self.settings.get("num_attention_heads"), self.settings.get("hidden_size")
        if key == "num_key_value_heads":
            return heads
        if key == "head_dim" and type(heads) is int and type(width) is int and heads > 0:
            return width // heads
        return None

    def _default(self, key: str) -> Any:
        part, _, inner = key.rpartition(".")
        part_config = self._config.get(part) if part else self._text
        if part.startswith("rope_scaling") or not isinstance(part_config, Mapping):
            return None
        return _silent(part_config, inner)


def canonical(value: Any) -> str:
    """A value as text that is the same for equal values: of 1 and 1.0, whatever they stand in."""
    return json.dumps(_even(value), sort_keys=True, ensure_ascii=False)


def _even(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return int(value)
    if isinstance(value, list):
        return [_even(item) for item in value]
    if isinstance(value, dict):
        return {key: _even(item) for key, item in value.items()}
    return value


def _silent(config: Mapping[str, Any], key: str) -> Any:
    """The default of a config's class; None where it is not known."""
    kind = config.get("model_type")
    defaults = class_defaults(kind) if isinstance(kind, str) else {}
    if key in ("rope_theta", "rope_local_base_freq") and key not in defaults and defaults:
        base = defaults.get("default_theta", 10000.0)
        local = key == "rope_local_base_freq"
        return base.get("local" if local else "global") if isinstance(base, dict) else base
    names = (old for old, new in _SPELLINGS.items() if new == key and old in defaults)
    return defaults.get(next(names, key))


def _normal(config: Mapping[str, Any], ignored: re.Pattern[str]) -> dict[str, Any]:
    """Keys that matter, in one spelling; nested configs as `part.key`."""
    result: dict[str, Any] = {}
    others: dict[str, Any] = {}
    for key, value in config.items():
        if ignored.search(_SPELLINGS.get(key, key)) or ignored.search(key) or key in _ROTARY:
            continue
        if isinstance(value, dict) and (key.endswith("_config") or "model_type" in value):
            inner = _normal(value, ignored)
            result |= {f"{key}.{name}": item for name, item in inner.items()}
            continue
        value = _ACTIVATIONS.get(value, value) if isinstance(value, str) else value
        (others if key in _SPELLINGS else result)[key] = value
    for key, value in others.items():
        name = _SPELLINGS[key]
        if result.get(name) is None:
            result[name] = value
        elif value is not None and canonical(value) != canonical(result[name]):
            result[key] = value  # which of the two counts is the class's secret
    listed = result.get("layer_types")
    kinds = [*map(canonical, listed)] if isinstance(listed, list) else []
    windowed = result.get("use_sliding_window", _silent(config, "use_sliding_window"))
    can_be_windowed = {'"full_attention"', '"sliding_attention"'}.issuperset(kinds)
    is_full = bool(kinds) and {*kinds} == {'"full_attention"'}
    if is_full or (windowed is False and can_be_windowed):  # no window, whatever its size
        result |= dict.fromkeys(("sliding_window", "max_window_layers", "layer_types"))
        result["use_sliding_window"] = False
    return result | _rotary(config)


_ROTARY = (
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "rope_local_base_freq",
    "partial_rotary_factor",
    "rotary_pct",
)


def _rotary(config: Mapping[str, Any]) -> dict[str, Any]:
    """Everything about rotary embeddings, whether it is written as before version 5 or since."""
    values = {key: config[key] for key in ("rope_theta", "rope_local_base_freq") if key in config}
    share = config.get("partial_rotary_factor", config.get("rotary_pct"))
    if share is not None:
        values["partial_rotary_factor"] = share
    for key in ("rope_scaling", "rope_parameters"):
        scaling = config.get(key)
        if not isinstance(scaling, dict):
            continue
        if scaling and all(isinstance(item, dict) or item is None for item in scaling.values()):
            # One set for each kind of layers, the sliding ones formerly under a key of their own.
            local = dict(scaling.get("sliding_attention") or {})
            if "rope_theta" in local:
                values["rope_local_base_freq"] = local.pop("rope_theta")
            values |= _scaling(local, "rope_scaling.sliding_attention.")
            scaling = scaling.get("full_attention") or {}
        values |= _scaling(scaling, "rope_scaling.")
    for key in ("rope_theta", "partial_rotary_factor"):
        above, within = config.get(key), values.get(key)
        if above is not None and canonical(above) != canonical(within):
            values[f"{key} beside rope_parameters"] = above  # a class may look at either
    return {key: value for key, value in values.items() if value is not None}


def _scaling(scaling: Mapping[str, Any], before: str) -> dict[str, Any]:
    result: dict[str, Any] = {}
    kind = scaling.get("rope_type", scaling.get("type"))
    for key, value in scaling.items():
        if key in ("rope_theta", "partial_rotary_factor"):
            result[key] = value
        elif key not in ("type", "rope_type"):
            result[before + key] = value
    if kind not in (None, "default"):
        result[f"{before}rope_type"] = kind
    return result
