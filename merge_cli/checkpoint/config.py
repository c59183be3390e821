"""The output's config.json: the donor's own, changed only where the merge changes the model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_NESTED = ("text_config", "llm_config")


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a config that describes the language model: multimodal models nest it."""
    nested = next((config[name] for name in _NESTED if isinstance(config.get(name), dict)), config)
    assert isinstance(nested, dict)
    return nested


def layer_count(config: Mapping[str, Any]) -> int | None:
    """How many layers the config says that the language model has."""
    counts = (text_config(config).get(key) for key in LAYER_COUNTS)
    return next((count for count in counts if isinstance(count, int)), None)


def merged_config(
    donor: Mapping[str, Any],
    *,
    dtype: str | None = None,
    tied: bool | None = None,
    layers: Sequence[tuple[Mapping[str, Any], int]] | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """The donor's config with what the merge decided.

    Args:
        dtype: the one dtype of the output; None leaves the donor's word.
        tied: the output's tie_word_embeddings; None leaves it.
        layers: for each output layer, its source's config and its layer there; None leaves them.

    Returns:
        The config and one line for each change.
    """
    config: dict[str, Any] = json.loads(json.dumps(donor))  # a deep copy of what JSON can hold
    changes: list[str] = []
    if dtype is not None:
        # transformers 5 writes `dtype`, older files say `torch_dtype`.
        key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
        if config.get(key) != dtype:
            changes.append(f"{key}: {config.get(key)} -> {dtype}")
            config[key] = dtype
        for name in _NESTED:
            nested = config.get(name)
            for inner in ("dtype", "torch_dtype"):
                if isinstance(nested, dict) and nested.get(inner) not in (None, dtype):
                    nested[inner] = dtype
    if tied is not None:
        for place in (config, *(config[n] for n in _NESTED if isinstance(config.get(n), dict))):
            if place is config or "tie_word_embeddings" in place:
                if place.get("tie_word_embeddings") != tied:
                    before = place.get("tie_word_embeddings")
                    changes.append(f"tie_word_embeddings: {before} -> {tied}")
                place["tie_word_embeddings"] = tied
    if layers is not None:
        changes += _stack_layers(text_config(config), layers)
    return config, changes


def _stack_layers(
    config: dict[str, Any], layers: Sequence[tuple[Mapping[str, Any], int]]
) -> list[str]:
    """Rewrite everything in the config that counts or lists layers."""
    before = next((config[key] for key in LAYER_COUNTS if isinstance(config.get(key), int)), None)
    changes = []
    for key in LAYER_COUNTS:
        if isinstance(config.get(key), int) and config[key] != len(layers):
            changes.append(f"{key}: {config[key]} -> {len(layers)}")
            config[key] = len(layers)
    for key, value in list(config.items()):
        # One entry for each layer (layer_types, mlp_layer_types, ...): each follows its layer.
        if isinstance(value, list) and before is not None and len(value) == before:
            moved = [_per_layer(source, key, value, index) for source, index in layers]
            if moved != value:
                config[key] = moved
                changes.append(f"{key}: follows the layers")
        elif key == "mlp_only_layers" and isinstance(value, list):
            # A list of layer numbers: each output layer that was made of such a layer.
            config[key] = [
                out for out, (source, index) in enumerate(layers)
                if index in (text_config(source).get(key) or [])
            ]  # fmt: skip
    return changes


def _per_layer(source: Mapping[str, Any], key: str, fallback: list[Any], index: int) -> Any:
    own = text_config(source).get(key)
    values = own if isinstance(own, list) and len(own) > index else fallback
    return values[index] if index < len(values) else values[-1]
