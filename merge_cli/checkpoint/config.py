"""The output's config.json: the donor's own, changed only where the merge changes the model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
CLASS = "_class_name"  # in a config of diffusers: what opens the model
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

    Raises:
        ValueError: stacked layers that no config can describe.
    """
    config: dict[str, Any] = json.loads(json.dumps(donor))  # a deep copy of what JSON can hold
    changes: list[str] = []
    # diffusers' configs have a class, and no dtype.
    said = bool(donor) and (CLASS not in donor or bool(donor.keys() & {"dtype", "torch_dtype"}))
    if dtype is not None and said:
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
    """Rewrite everything in the config that counts or lists layers.

    Raises:
        ValueError: a rule by position that the stacked layers do not follow.
    """
    before = layer_count(config)
    changes = []
    for key in LAYER_COUNTS:
        if isinstance(config.get(key), int) and config[key] != len(layers):
            changes.append(f"{key}: {config[key]} -> {len(layers)}")
            config[key] = len(layers)
    for key, value in list(config.items()):
        # One entry for each layer (layer_types, mlp_layer_types, ...): each follows its layer.
        listed = isinstance(value, list) and before is not None and len(value) == before
        if listed and "token" not in key and key not in ("architectures", "mlp_only_layers"):
            moved = [_per_layer(source, key, value, index) for source, index in layers]
            if moved != value:
                config[key] = moved
                changes.append(f"{key}: follows the layers")
    changes += _stack_experts(config, layers)
    in_order = [index for _, index in layers] == list(range(len(layers)))
    for key in _BY_POSITION:
        rule = config.get(key)
        if key == "full_attention_interval" and "layer_types" in config:
            continue  # the list says it, and has followed
        if not in_order and (isinstance(rule, list | str) or (isinstance(rule, int) and rule > 1)):
            raise ValueError(f"config.json says by position which layers are which ({key}: {rule})")
    return changes


# Rules that say by number which layers are of which kind, and have no form as a list.
_BY_POSITION = ("cross_attention_layers", "hybrid_override_pattern",
                "attn_layer_period", "expert_layer_period", "interleave_moe_layer_step",
                "moe_layer_freq", "full_attention_interval")  # fmt: skip


def _stack_experts(
    config: dict[str, Any], layers: Sequence[tuple[Mapping[str, Any], int]]
) -> list[str]:
    """Which layers have experts, when the config says it by number (Qwen-MoE, DeepSeek)."""
    if "decoder_sparse_step" in config or "mlp_only_layers" in config:
        dense = [out for out, (source, index) in enumerate(layers) if not _is_sparse(source, index)]
        if config.get("decoder_sparse_step", 1) != 1 or dense != (
            config.get("mlp_only_layers") or []
        ):
            config |= {"decoder_sparse_step": 1, "mlp_only_layers": dense}
            return ["mlp_only_layers: follows the layers"]
    if isinstance(config.get("first_k_dense_replace"), int):
        first = config["first_k_dense_replace"]
        dense = [
            out
            for out, (source, index) in enumerate(layers)
            if index < text_config(source).get("first_k_dense_replace", first)
        ]
        if dense != list(range(len(dense))):
            raise ValueError("its dense layers must come first (first_k_dense_replace)")
        if len(dense) != first:
            config["first_k_dense_replace"] = len(dense)
            return [f"first_k_dense_replace: {first} -> {len(dense)}"]
    return []


def _is_sparse(source: Mapping[str, Any], index: int) -> bool:
    """Qwen-MoE's rule for which layers have experts."""
    config = text_config(source)
    step = config.get("decoder_sparse_step") or 1
    return index not in (config.get("mlp_only_layers") or []) and (index + 1) % step == 0


def with_layer_types(config: Mapping[str, Any], root: Path) -> dict[str, Any]:
    """A config with `layer_types` written out, where transformers derives it from positions.

    Stacked layers are at other positions, and would otherwise get another kind of attention.
    """
    explicit: dict[str, Any] = json.loads(json.dumps(config))
    target = text_config(explicit)
    if "layer_types" in target or "model_type" not in explicit:
        return explicit
    from transformers import AutoConfig

    try:
        known = AutoConfig.from_pretrained(str(root), trust_remote_code=False)
    except Exception:
        # An architecture that this transformers does not know, or a config that it refuses with
        # whatever exception its class has: there is nothing to derive, and the file is copied.
        return explicit
    kinds = getattr(known.get_text_config(), "layer_types", None)
    if kinds is not None and len(set(kinds)) > 1:
        target["layer_types"] = list(kinds)
    return explicit


def _per_layer(source: Mapping[str, Any], key: str, fallback: list[Any], index: int) -> Any:
    own = text_config(source).get(key)
    values = own if isinstance(own, list) and len(own) > index else fallback
    return values[index] if index < len(values) else values[-1]
