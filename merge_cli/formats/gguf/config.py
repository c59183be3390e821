"""config.json from the keys of a GGUF file.

Every number is held against bounds before shapes follow from it. Keys that change what the model
computes, and that this file does not know how to write down, are refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from merge_cli.errors import CorruptFileError, SourceError
from merge_cli.formats.gguf.architecture_keys import MAX_WIDTH, ArchitectureKeys
from merge_cli.formats.gguf.architectures import ARCHITECTURES, Shapes
from merge_cli.formats.gguf.header import ROPE_FACTORS, Header
from merge_cli.formats.gguf.rotary import llama3_scaling, scaling_of
from merge_cli.formats.gguf.stored_vocabulary import PREFIX
from merge_cli.system.untrusted import Unreadable, whole_number

_MAX_LAYERS = 100_000
_MAX_EXPERTS = 4096
_TOKENS = {
    "bos_token_id": f"{PREFIX}bos_token_id",
    "eos_token_id": f"{PREFIX}eos_token_id",
    "pad_token_id": f"{PREFIX}padding_token_id",
}


def config_of(
    header: Header, model_type: str, label: str, file: str
) -> tuple[dict[str, Any], Shapes]:
    """config.json, without `dtype` and biases, and the sizes that the tensors should have.

    Args:
        model_type: transformers' name of the architecture.

    Raises:
        SourceError: keys that change the model in a way that is not understood.
        CorruptFileError: keys that are missing or impossible.
    """
    architecture = ARCHITECTURES[model_type]
    keys = ArchitectureKeys(header.values, architecture.name)
    where = {"model": label, "file": file}
    hint = "Merge the model that the file was made of."
    experts = keys.get("expert_count")
    if experts and not architecture.experts:
        message = f"a mixture of {str(experts)[:20]} experts of the architecture "
        raise SourceError(f"{message}{architecture.name}, which is not read", **where, hint=hint)
    unknown = keys.unknown(architecture.keys)
    if unknown:
        message = f"its key {unknown[0][:100]} is not understood"
        raise SourceError(message, **where, hint=hint)
    tensors = {tensor.name: tensor for tensor in header.tensors}
    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        raise CorruptFileError("it has no embedding", **where, tensor="token_embd.weight")
    try:
        shapes = _shapes(keys, model_type, embedding.shape[0])
        config = _config(keys, model_type, shapes)
        config["tie_word_embeddings"] = "output.weight" not in tensors
        config.update(_tokens(header.values, shapes.vocabulary))
        scaling = scaling_of(keys, config["max_position_embeddings"])
    except Unreadable as error:
        raise CorruptFileError(str(error), **where) from None
    factors = tensors.get(ROPE_FACTORS)
    if factors is not None and scaling is None:
        stored = header.factors.get(ROPE_FACTORS, b"")
        scaling = llama3_scaling(stored, factors, shapes, config["rope_theta"], where)
    if scaling is not None:
        config["rope_scaling"] = scaling
    return config, shapes


def _shapes(keys: ArchitectureKeys, model_type: str, vocabulary: int) -> Shapes:
    hidden = keys.number("embedding_length", MAX_WIDTH)
    heads = keys.number("attention.head_count", MAX_WIDTH)
    if "attention.key_length" not in keys and hidden % heads:
        raise Unreadable(f"{hidden} numbers are not shared evenly by {heads} heads")
    head = keys.number("attention.key_length", MAX_WIDTH, hidden // heads)
    # Phi 3 may rotate a part of each head.
    whole = ("attention.value_length", *(("rope.dimension_count",) * (model_type != "phi3")))
    for key in whole:
        if keys.number(key, MAX_WIDTH, head) != head:
            raise Unreadable(f"{key} is {keys.get(key)}, and a head has {head} numbers")
    if head % 2:
        raise Unreadable(f"heads of {head} numbers cannot be rotated in pairs")
    kv_heads = keys.number("attention.head_count_kv", MAX_WIDTH, heads)
    if heads % kv_heads:
        raise Unreadable(f"{heads} heads do not share {kv_heads} of keys evenly")
    layers = keys.number("block_count", _MAX_LAYERS)
    mlp = keys.number("feed_forward_length", MAX_WIDTH)
    plain = Shapes(vocabulary, hidden, layers, mlp, heads, kv_heads, head)
    if model_type == "phi3":
        return replace(plain, fused=True)
    if not ARCHITECTURES[model_type].experts:
        return plain
    experts = keys.number("expert_count", _MAX_EXPERTS)
    if layers * experts > _MAX_LAYERS:
        raise Unreadable(f"{layers} layers of {experts} experts are more than any model has")
    expert_mlp = keys.number("expert_feed_forward_length", MAX_WIDTH, mlp)
    shared = 0
    if model_type == "qwen2_moe":
        shared = keys.number("expert_shared_feed_forward_length", MAX_WIDTH)
    return replace(plain, experts=experts, expert_mlp=expert_mlp, shared_mlp=shared)


def _config(keys: ArchitectureKeys, model_type: str, shapes: Shapes) -> dict[str, Any]:
    class_name, specific_values = ARCHITECTURES[model_type].class_name, {}
    if model_type == "llama" and _windowed(keys):  # to llama.cpp Mistral is a llama
        model_type, class_name = "mistral", "MistralForCausalLM"
        specific_values = {"sliding_window": keys.number("attention.sliding_window", MAX_WIDTH)}
    config: dict[str, Any] = {
        "architectures": [class_name],
        "model_type": model_type,
        "vocab_size": shapes.vocabulary,
        "hidden_size": shapes.hidden,
        "intermediate_size": shapes.mlp,
        "num_hidden_layers": shapes.layers,
        "num_attention_heads": shapes.heads,
        "num_key_value_heads": shapes.kv_heads,
        "head_dim": shapes.head,
        "hidden_act": "silu",
        "max_position_embeddings": keys.number("context_length", MAX_WIDTH),
        "rms_norm_eps": keys.real("attention.layer_norm_rms_epsilon"),
        "rope_theta": keys.real("rope.freq_base", 10000.0),
    }
    if model_type in ("gemma2", "gemma3_text"):
        del config["hidden_act"]
    specific = _SPECIFIC.get(model_type)
    return config | specific_values | (specific(keys, shapes) if specific else {})


def _mixtral(keys: ArchitectureKeys, shapes: Shapes) -> dict[str, Any]:
    return {
        "num_local_experts": shapes.experts,
        "num_experts_per_tok": keys.number("expert_used_count", shapes.experts),
    }


def _qwen_moe(keys: ArchitectureKeys, shapes: Shapes) -> dict[str, Any]:
    """Every layer is a mixture. llama.cpp makes the chosen weights sum to one in Qwen 3 alone."""
    config = {
        "num_experts": shapes.experts,
        "num_experts_per_tok": keys.number("expert_used_count", shapes.experts),
        "moe_intermediate_size": shapes.expert_mlp,
        "norm_topk_prob": not shapes.shared_mlp,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    if shapes.shared_mlp:
        config["shared_expert_intermediate_size"] = shapes.shared_mlp
    return config


def _gemma(keys: ArchitectureKeys, shapes: Shapes) -> dict[str, Any]:
    return {"hidden_act": "gelu_pytorch_tanh", "attention_bias": False}


def _gemma2(keys: ArchitectureKeys, shapes: Shapes) -> dict[str, Any]:
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "attn_logit_softcapping": keys.real("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": keys.real("final_logit_softcapping", 30.0),
        "sliding_window": keys.number("attention.sliding_window", MAX_WIDTH, 4096),
        "query_pre_attn_scalar": _query_scalar(shapes, 46),
    }


def _gemma3(keys: ArchitectureKeys, shapes: Shapes) -> dict[str, Any]:
    softcap = "final_logit_softcapping"
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "attn_logit_softcapping": None,
        softcap: keys.real(softcap) if softcap in keys else None,
        "sliding_window": keys.number("attention.sliding_window", MAX_WIDTH),
        "rope_local_base_freq": keys.real("rope.freq_base_swa", 10000.0),
        "query_pre_attn_scalar": _query_scalar(shapes, 62),
    }


def _query_scalar(shapes: Shapes, largest: int) -> int:
    """What attention is scaled by: as llama.cpp has it, the largest model (27B) has its own."""
    return shapes.hidden // shapes.heads if shapes.layers == largest else shapes.head


def _phi3(keys: ArchitectureKeys, shapes: Shapes) -> dict[str, Any]:
    length = keys.number("context_length", MAX_WIDTH)
    window = keys.number("attention.sliding_window", MAX_WIDTH) if _windowed(keys) else None
    rotated = keys.number("rope.dimension_count", shapes.head, shapes.head)
    return {
        "original_max_position_embeddings": keys.number(
            "rope.scaling.original_context_length", MAX_WIDTH, length
        ),
        "pad_token_id": None,  # the class's own is of a larger vocabulary
        "partial_rotary_factor": rotated / shapes.head,
        "sliding_window": window,
    }


_SPECIFIC = {
    "mixtral": _mixtral,
    "qwen2_moe": _qwen_moe,
    "qwen3_moe": _qwen_moe,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "phi3": _phi3,
}


def _windowed(keys: ArchitectureKeys) -> bool:
    return keys.get("attention.sliding_window") not in (None, 0)


def _tokens(values: Mapping[str, Any], vocabulary: int) -> dict[str, int]:
    return {
        key: whole_number(values[name], name, most=vocabulary - 1)
        for key, name in _TOKENS.items()
        if name in values
    }
