"""A model's settings as the keys of a GGUF file, and whether nothing of them is lost.

What the keys would be read as is compared with the config, both as transformers' class reads them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from merge_cli.checkpoint.class_config import known_class, quiet_and_alone, without_choices
from merge_cli.errors import SourceError
from merge_cli.formats.gguf.architectures import ARCHITECTURES, Shapes
from merge_cli.formats.gguf.config import config_of
from merge_cli.formats.gguf.header import BlockTensor, Header
from merge_cli.formats.gguf.rotary import LLAMA3, llama3_factors

_USUAL_LOCAL_BASE = 10000.0  # of rotary frequencies in Gemma 3's sliding layers
# Of config.json: what changes nothing that a model says, or what only training uses.
_WITHOUT_EFFECT = frozenset(
    (
        "architectures",
        "attention_dropout",
        "bos_token_id",  # of the tokenizer
        "eos_token_id",
        "dtype",
        "initializer_range",
        "embd_pdrop",
        "max_window_layers",
        "output_router_logits",
        "pad_token_id",
        "pretraining_tp",
        "resid_pdrop",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "torch_dtype",
        "transformers_version",
        "unk_token_id",
        "use_cache",
        "_name_or_path",
    )
)


def as_transformers_reads(config: Mapping[str, Any], label: str) -> dict[str, Any]:
    """A config with every default that its class has.

    Raises:
        SourceError: its class refuses it.
    """
    try:
        with quiet_and_alone():
            _, settings = known_class(config)
            return dict(settings.from_dict(without_choices(config)).to_dict())
    except Exception as error:  # a config's own code checks it, with errors of any kind
        message = f"its config cannot be read: {str(error)[:200]}"
        raise SourceError(message, model=label, file="config.json") from None


def shapes_of(settings: Mapping[str, Any], model_type: str) -> Shapes:
    """The sizes that decide the shapes of tensors."""
    heads = settings["num_attention_heads"]
    experts = settings.get("num_local_experts") or settings.get("num_experts") or 0
    return Shapes(
        vocabulary=settings["vocab_size"],
        hidden=settings["hidden_size"],
        layers=settings["num_hidden_layers"],
        mlp=settings["intermediate_size"],
        heads=heads,
        kv_heads=settings.get("num_key_value_heads") or heads,
        head=settings.get("head_dim") or settings["hidden_size"] // heads,
        experts=experts,
        expert_mlp=settings.get("moe_intermediate_size") or settings["intermediate_size"],
        shared_mlp=settings.get("shared_expert_intermediate_size") or 0,
        fused=model_type == "phi3",
    )


def keys_of(settings: Mapping[str, Any], model_type: str, shapes: Shapes) -> dict[str, Any]:
    """The keys of a config, in the order in which llama.cpp writes them."""
    rope, architecture = _rope(settings), ARCHITECTURES[model_type]
    about: dict[str, Any] = {
        "vocab_size": shapes.vocabulary,
        "context_length": settings["max_position_embeddings"],
        "embedding_length": shapes.hidden,
        "block_count": shapes.layers,
        "feed_forward_length": shapes.mlp,
        "attention.head_count": shapes.heads,
        "attention.head_count_kv": shapes.kv_heads,
        "attention.layer_norm_rms_epsilon": float(settings["rms_norm_eps"]),
        "attention.key_length": shapes.head,
        "attention.value_length": shapes.head,
        "rope.dimension_count": round(shapes.head * rope.get("partial_rotary_factor", 1.0)),
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if rope["rope_type"] in ("linear", "yarn"):
        about["rope.scaling.type"] = rope["rope_type"]
        about["rope.scaling.factor"] = float(rope["factor"])
    if rope.get("original_max_position_embeddings") and rope["rope_type"] == "yarn":
        length = rope["original_max_position_embeddings"]
        about["rope.scaling.original_context_length"] = length
    about |= _specific_keys(settings, model_type, shapes)
    named = {f"{architecture.name}.{key}": value for key, value in about.items()}
    return {"general.architecture": architecture.name, "general.type": "model", **named}


def _specific_keys(settings: Mapping[str, Any], model_type: str, shapes: Shapes) -> dict[str, Any]:
    """The keys that not every architecture has."""
    keys: dict[str, Any] = {}
    if ARCHITECTURES[model_type].experts:
        keys = {
            "expert_count": shapes.experts,
            "expert_used_count": settings["num_experts_per_tok"],
        }
    if "moe_intermediate_size" in settings:
        keys["expert_feed_forward_length"] = shapes.expert_mlp
    if shapes.shared_mlp:
        keys["expert_shared_feed_forward_length"] = shapes.shared_mlp
    if "attention.sliding_window" in ARCHITECTURES[model_type].keys and model_type != "llama":
        keys["attention.sliding_window"] = settings.get("sliding_window") or 0
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if settings.get(key) is not None and key in ARCHITECTURES[model_type].keys:
            keys[key] = float(settings[key])
    if model_type == "gemma3_text":
        local = settings.get("rope_parameters", {}).get("sliding_attention", {})
        theta = local.get("rope_theta", settings.get("rope_local_base_freq"))
        if theta != _USUAL_LOCAL_BASE:  # which llama.cpp takes without a key
            keys["rope.freq_base_swa"] = float(theta)
    if model_type == "phi3":
        length = settings["original_max_position_embeddings"]
        keys["rope.scaling.original_context_length"] = length
    return keys


def rotary_factors(settings: Mapping[str, Any], shapes: Shapes, label: str) -> Any:
    """The factors of Llama 3.1's rotary frequencies: float32 [head / 2]; None of others.

    Raises:
        SourceError: other numbers than Llama 3.1's, which reading would not find again.
    """
    import numpy as np

    rope = _rope(settings)
    if rope["rope_type"] != "llama3":
        return None
    if any(rope.get(key) != value for key, value in LLAMA3.items()):
        message = "its scaling of positions is not Llama 3.1's, which is all that is written"
        raise SourceError(message, model=label, file="config.json")
    return llama3_factors(shapes.head, rope["rope_theta"], rope["factor"]).astype(np.float32)


def check_config(
    values: Mapping[str, Any],
    tensors: Sequence[BlockTensor],
    settings: Mapping[str, Any],
    model_type: str,
    label: str,
) -> None:
    """Whether the keys say what the config says.

    Raises:
        SourceError: names a key of config.json that would be lost.
    """
    header = Header(b"", values, tuple(tensors))
    config, _ = config_of(header, model_type, label, "model.gguf")
    biases = {key: settings[key] for key in ("attention_bias", "mlp_bias") if key in settings}
    back = as_transformers_reads({**config, **biases}, label)
    ignored = set(_WITHOUT_EFFECT)
    if _rope(settings)["rope_type"] == "llama3":  # written as a tensor
        ignored |= {"rope_parameters", "rope_scaling"}
    keys = sorted((settings.keys() | back.keys()) - ignored)
    lost = [key for key in keys if settings.get(key) != back.get(key)]
    if lost:
        message = (
            f"GGUF cannot say what its config says of {lost[0]}: {str(settings.get(lost[0]))[:60]}"
        )
        raise SourceError(message, model=label, file="config.json")


def _rope(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Base and scaling of positions, as transformers 5 has them, or 4; of Gemma 3's full layers."""
    if settings.get("rope_parameters"):
        rope = settings["rope_parameters"]
        return dict(rope.get("full_attention", rope))
    scaling = dict(settings.get("rope_scaling") or {})
    return {
        "rope_type": scaling.pop("type", "default"),
        "rope_theta": settings["rope_theta"],
        **scaling,
    }
