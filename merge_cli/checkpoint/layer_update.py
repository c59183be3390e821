"""One layer's weight with its factors: whether they fit, and what they make."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from merge_cli.checkpoint import expert_adapters as experts
from merge_cli.checkpoint.adapter_config import by_pattern
from merge_cli.checkpoint.adapter_contents import Parts
from merge_cli.checkpoint.header import MERGEABLE
from merge_cli.checkpoint.low_rank import UpdatedTensor
from merge_cli.checkpoint.tensors import Tensor

# transformers' classes with layers that are stored [in, out], and what those are called.
_WITH_CONV1D = frozenset(
    (
        "gpt2",
        "openai-gpt",
        "imagegpt",
        "decision_transformer",
        "clvp",
        "clvp_decoder",
    )
)
_CONV1D = frozenset(("c_attn", "q_attn", "c_fc", "c_proj"))


def scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    """What the product of a module's factors is multiplied with: alpha / r, or alpha / sqrt(r)."""
    return experts.scale_of(config, module, rank)


def contradictions(
    layers: Mapping[str, Parts], config: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    """The first module whose tensors are not what the config says, and why."""
    missing = next((m for m, parts in layers.items() if "magnitude" not in parts), None)
    if config.get("use_dora") and missing is not None:
        yield missing, "use_dora is set, and the adapter has no magnitude for it"
    found = next((m for m, parts in layers.items() if "magnitude" in parts), None)
    if config.get("use_dora") is False and found is not None:
        yield found, "the adapter has a magnitude for it, and use_dora is not set"


def is_turned(
    weight: Tensor, parts: Parts, config: Mapping[str, Any], module: str, kind: str
) -> bool:
    """Whether a layer is stored [in, out].

    `fan_in_fan_out` is what PEFT found of the last layer that it wrapped: beside a head it is
    false for all of GPT-2's. So the class says it, where it is known to have such layers, and
    the shapes otherwise.

    Args:
        kind: the model_type.
    """
    named = module.removesuffix(".base_layer").rpartition(".")[2] in _CONV1D
    if kind in _WITH_CONV1D:
        return named
    straight = (parts["b"].shape[0], parts["a"].shape[-1])
    if straight[0] != straight[1] and weight.shape in (straight, straight[::-1]):
        return weight.shape != straight
    # PEFT takes no notice of it where the layer is an ordinary one.
    return bool(config.get("fan_in_fan_out")) and (named or not kind)


def why_unusable(
    weight: Tensor, parts: Parts, config: Mapping[str, Any], module: str, kind: str
) -> str:
    """Why a module's factors do not fit its weight; empty when they do."""
    if "bias" in parts and "magnitude" in parts:
        return "DoRA with biases of its own (lora_bias) is not applied here"
    embedding = "embedding_a" in parts
    names = ("embedding_a", "embedding_b") if embedding else ("a", "b")
    missing = [name for name in names if name not in parts]
    if missing:
        return f"the adapter lacks a factor ({', '.join(missing)})"
    extra = parts.keys() - {*names, "magnitude", "bias"}
    if extra:
        return "the adapter has factors of a layer and of an embedding for it"
    if weight.dtype not in MERGEABLE or weight.dtype == "F64":
        return f"its weight ({weight.native}) cannot be updated"
    if len(weight.shape) != 2 or any(len(parts[name].shape) != 2 for name in names):
        what = f"only matrices are updated, not {list(weight.shape)}"
        return f"{what}: merge the adapter with PEFT (`merge_and_unload`), and name the result"
    a, b = (parts[name].shape for name in names)
    wanted = (b[0], a[1])
    turned = not embedding and is_turned(weight, parts, config, module, kind)
    if embedding or turned:
        wanted = (a[1], b[0])
    if a[0] != b[1] or wanted != weight.shape or not a[0]:
        return f"factors {list(a)} and {list(b)} do not make {list(weight.shape)}"
    if "magnitude" in parts and (embedding or turned):
        return "DoRA is not applied to embeddings and to layers that are stored [in, out]"
    if "magnitude" in parts and parts["magnitude"].size != weight.shape[0]:
        return (
            f"its magnitude {list(parts['magnitude'].shape)} is not that of {weight.shape[0]} rows"
        )
    said = by_pattern(config.get("rank_pattern"), module, config.get("r"))
    if type(said) is int and said != a[0]:
        return f"its factors have the rank {a[0]}, and {said} is what adapter_config.json says"
    return ""


def updated(
    weight: Tensor, parts: Parts, config: Mapping[str, Any], module: str, kind: str, stamp: str
) -> UpdatedTensor:
    if "embedding_a" in parts:
        a, b = parts["embedding_a"], parts["embedding_b"]
        return UpdatedTensor(weight, a, b, scaling(config, module, a.shape[0]), True, None, stamp)
    a, b = parts["a"], parts["b"]
    scale = scaling(config, module, a.shape[0])
    if is_turned(weight, parts, config, module, kind):
        return UpdatedTensor(weight, a, b, scale, True, None, stamp)
    return UpdatedTensor(weight, b, a, scale, False, parts.get("magnitude"), stamp)
