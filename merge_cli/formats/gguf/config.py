"""config.json from the keys of a GGUF file.

Every number is held against bounds before shapes follow from it. Keys that change what the model
computes, and that this file does not know how to write down, are refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from merge_cli.errors import CorruptFileError, SourceError
from merge_cli.formats.gguf.architectures import ARCHITECTURES, Shapes
from merge_cli.formats.gguf.header import ROPE_FACTORS, BlockTensor, Header
from merge_cli.system.untrusted import Unreadable, whole_number

_MAX_LAYERS = 100_000
_MAX_WIDTH = 2**31
_MAX_EXPERTS = 4096
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
_TOKENS = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}
# Llama 3.1 and its successors: the length that the models were trained on before, and where
# frequencies begin and end to be scaled. Files have the factors that follow from these alone.
LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


class _Keys:
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
    keys = _Keys(header.values, architecture.name)
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
        scaling = _scaling(keys, config["max_position_embeddings"])
    except Unreadable as error:
        raise CorruptFileError(str(error), **where) from None
    factors = tensors.get(ROPE_FACTORS)
    if factors is not None and scaling is None:
        stored = header.factors.get(ROPE_FACTORS, b"")
        scaling = _llama3_scaling(stored, factors, shapes, config["rope_theta"], where)
    if scaling is not None:
        config["rope_scaling"] = scaling
    return config, shapes


def _shapes(keys: _Keys, model_type: str, vocabulary: int) -> Shapes:
    hidden = keys.number("embedding_length", _MAX_WIDTH)
    heads = keys.number("attention.head_count", _MAX_WIDTH)
    if "attention.key_length" not in keys and hidden % heads:
        raise Unreadable(f"{hidden} numbers are not shared evenly by {heads} heads")
    head = keys.number("attention.key_length", _MAX_WIDTH, hidden // heads)
    # Phi 3 may rotate a part of each head.
    whole = ("attention.value_length", *(("rope.dimension_count",) * (model_type != "phi3")))
    for key in whole:
        if keys.number(key, _MAX_WIDTH, head) != head:
            raise Unreadable(f"{key} is {keys.get(key)}, and a head has {head} numbers")
    if head % 2:
        raise Unreadable(f"heads of {head} numbers cannot be rotated in pairs")
    kv_heads = keys.number("attention.head_count_kv", _MAX_WIDTH, heads)
    if heads % kv_heads:
        raise Unreadable(f"{heads} heads do not share {kv_heads} of keys evenly")
    layers = keys.number("block_count", _MAX_LAYERS)
    mlp = keys.number("feed_forward_length", _MAX_WIDTH)
    plain = Shapes(vocabulary, hidden, layers, mlp, heads, kv_heads, head)
    if model_type == "phi3":
        return replace(plain, fused=True)
    if not ARCHITECTURES[model_type].experts:
        return plain
    experts = keys.number("expert_count", _MAX_EXPERTS)
    if layers * experts > _MAX_LAYERS:
        raise Unreadable(f"{layers} layers of {experts} experts are more than any model has")
    expert_mlp = keys.number("expert_feed_forward_length", _MAX_WIDTH, mlp)
    shared = 0
    if model_type == "qwen2_moe":
        shared = keys.number("expert_shared_feed_forward_length", _MAX_WIDTH)
    return replace(plain, experts=experts, expert_mlp=expert_mlp, shared_mlp=shared)


def _config(keys: _Keys, model_type: str, shapes: Shapes) -> dict[str, Any]:
    class_name, specific_values = ARCHITECTURES[model_type].class_name, {}
    if model_type == "llama" and _windowed(keys):  # to llama.cpp Mistral is a llama
        model_type, class_name = "mistral", "MistralForCausalLM"
        specific_values = {"sliding_window": keys.number("attention.sliding_window", _MAX_WIDTH)}
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
        "max_position_embeddings": keys.number("context_length", _MAX_WIDTH),
        "rms_norm_eps": keys.real("attention.layer_norm_rms_epsilon"),
        "rope_theta": keys.real("rope.freq_base", 10000.0),
    }
    if model_type in ("gemma2", "gemma3_text"):
        del config["hidden_act"]
    specific = _SPECIFIC.get(model_type)
    return config | specific_values | (specific(keys, shapes) if specific else {})


def _mixtral(keys: _Keys, shapes: Shapes) -> dict[str, Any]:
    return {
        "num_local_experts": shapes.experts,
        "num_experts_per_tok": keys.number("expert_used_count", shapes.experts),
    }


def _qwen_moe(keys: _Keys, shapes: Shapes) -> dict[str, Any]:
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


def _gemma(keys: _Keys, shapes: Shapes) -> dict[str, Any]:
    return {"hidden_act": "gelu_pytorch_tanh", "attention_bias": False}


def _gemma2(keys: _Keys, shapes: Shapes) -> dict[str, Any]:
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "attn_logit_softcapping": keys.real("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": keys.real("final_logit_softcapping", 30.0),
        "sliding_window": keys.number("attention.sliding_window", _MAX_WIDTH, 4096),
        "query_pre_attn_scalar": _query_scalar(shapes, 46),
    }


def _gemma3(keys: _Keys, shapes: Shapes) -> dict[str, Any]:
    softcap = "final_logit_softcapping"
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "attn_logit_softcapping": None,
        softcap: keys.real(softcap) if softcap in keys else None,
        "sliding_window": keys.number("attention.sliding_window", _MAX_WIDTH),
        "rope_local_base_freq": keys.real("rope.freq_base_swa", 10000.0),
        "query_pre_attn_scalar": _query_scalar(shapes, 62),
    }


def _query_scalar(shapes: Shapes, largest: int) -> int:
    """What attention is scaled by: as llama.cpp has it, the largest model (27B) has its own."""
    return shapes.hidden // shapes.heads if shapes.layers == largest else shapes.head


def _phi3(keys: _Keys, shapes: Shapes) -> dict[str, Any]:
    length = keys.number("context_length", _MAX_WIDTH)
    window = keys.number("attention.sliding_window", _MAX_WIDTH) if _windowed(keys) else None
    rotated = keys.number("rope.dimension_count", shapes.head, shapes.head)
    return {
        "original_max_position_embeddings": keys.number(
            "rope.scaling.original_context_length", _MAX_WIDTH, length
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


def _windowed(keys: _Keys) -> bool:
    return keys.get("attention.sliding_window") not in (None, 0)


def _tokens(values: Mapping[str, Any], vocabulary: int) -> dict[str, int]:
    return {
        key: whole_number(values[name], name, most=vocabulary - 1)
        for key, name in _TOKENS.items()
        if name in values
    }


def _scaling(keys: _Keys, length: int) -> dict[str, Any] | None:
    """`rope_scaling`, as far as keys say it."""
    # A factor without a type is a linear one.
    kind = keys.get("rope.scaling.type") or ("linear" if "rope.scaling.factor" in keys else None)
    if kind in (None, "none"):
        return None
    if kind not in ("linear", "yarn"):
        raise Unreadable(f"rope.scaling.type {str(kind)[:60]!r} is not understood")
    scaling: dict[str, Any] = {"rope_type": kind, "factor": keys.real("rope.scaling.factor")}
    if kind == "yarn":
        original = keys.number("rope.scaling.original_context_length", _MAX_WIDTH, length)
        scaling["original_max_position_embeddings"] = original
    return scaling


def _llama3_scaling(
    raw: bytes, factors: BlockTensor, shapes: Shapes, theta: float, where: Mapping[str, str]
) -> dict[str, Any] | None:
    """`rope_scaling` of Llama 3.1, whose files hold a factor for each frequency.

    Raises:
        SourceError: factors that do not follow from the numbers that those models have.
    """
    import numpy as np

    refused = SourceError(
        "its factors of rotary frequencies are not understood: they are not Llama 3.1's",
        **where,
        tensor=factors.name,
    )
    if factors.kind.dtype != "F32" or factors.shape != (shapes.head // 2,):
        raise refused
    stored = np.frombuffer(raw, np.float32).astype(np.float64)
    if len(stored) != shapes.head // 2 or not np.isfinite(stored).all():
        raise refused
    factor = float(f"{stored.max():.6g}")  # 8, not what float32 made of a quotient
    if (stored == 1).all():
        return None
    computed = llama3_factors(shapes.head, theta, factor)
    if not np.allclose(stored, computed, rtol=1e-4, atol=0):
        raise refused
    return {"rope_type": "llama3", "factor": factor, **LLAMA3}


def llama3_factors(head: int, theta: float, factor: float) -> Any:
    """By how much Llama 3.1 divides each rotary frequency: float64 [head / 2].

    Long waves by `factor`, short ones by 1, and those between by a smooth mean of both. Llama 3.1's
    reference code, `apply_scaling`.
    """
    import numpy as np

    low, high, length = (float(number) for number in LLAMA3.values())
    waves = 2 * math.pi * theta ** (np.arange(0, head, 2, dtype=np.float64) / head)
    smooth = np.clip((length / waves - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)
