"""LoRA adapters as PEFT saves them: which tensors of a model they change, and how.

    adapter_config.json         kind, rank, alpha, patterns
    adapter_model.safetensors   base_model.model.MODULE.lora_A.weight, ...lora_B.weight, ...

Every tensor of an adapter is used, or the adapter is refused with its name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from merge_cli.checkpoint.header import MERGEABLE, TensorRef
from merge_cli.checkpoint.low_rank import Shifted, Updated
from merge_cli.checkpoint.tensors import Tensor
from merge_cli.errors import MismatchError, Problem, SourceError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
_FACTORS = {
    "lora_A.weight": "a", "lora_B.weight": "b", "lora_embedding_A": "embedding_a",
    "lora_embedding_B": "embedding_b", "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude", "lora_B.bias": "bias",
}  # fmt: skip
Parts = dict[str, TensorRef]


@dataclass(frozen=True)
class Applied:
    """A model's tensors with an adapter.

    Attributes:
        tensors: all of them, by name.
        notes: what was done, for the plan.
        changes: keys of the model's config that follow.
    """

    tensors: Mapping[str, Tensor]
    notes: tuple[str, ...]
    changes: Mapping[str, Any] = field(default_factory=dict)


def apply_adapter(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], stored: Mapping[str, TensorRef],
    *, label: str, stamp: str,
) -> Applied:  # fmt: skip
    """The model's tensors, those that the adapter changes as computed ones.

    Args:
        tensors: of the base model.
        config, stored: the adapter's.
        label: the model with its adapter, as the recipe names it.
        stamp: tells the adapter's files apart from others at their place.

    Raises:
        SourceError: a kind of adapter that is not applied.
        MismatchError: tensors of the adapter that fit nothing, all of them.
    """
    _refuse_kinds(config, label)
    modules, whole = sorted_out(stored)
    problems: list[Problem] = []
    found: dict[str, Tensor] = dict(tensors)
    places = _Places(tensors)
    replaced: list[str] = []
    changes: dict[str, Any] = {}
    for name, ref in whole.items():  # first: an update may be of what the adapter replaces
        target = places.of(name)
        if target is None:
            problems.append(Problem(f"{label}: the adapter brings it, the model lacks it", name))
            continue
        if ref.shape != tensors[target].shape:
            if len(ref.shape) != 2 or ref.shape[1:] != tensors[target].shape[1:]:
                what = f"{list(ref.shape)} in the adapter, {list(tensors[target].shape)} without"
                problems.append(Problem(f"{label}: {what}", name))
                continue
            changes["vocab_size"] = ref.shape[0]  # an embedding, or a head, with more tokens
        found[target] = ref._replace(name=target)
        replaced.append(target)
    updated = 0
    for module, parts in modules.items():
        target = places.of(f"{module}.weight")
        if target is None:
            problems.append(Problem(f"{label}: the adapter changes it, the model lacks it", module))
            continue
        weight = found[target]
        why = _unusable(weight, parts, config)
        if why:
            problems.append(Problem(f"{label}: {why}", module))
            continue
        found[target] = _update(weight, parts, config, module, stamp)
        updated += 1
        if "bias" in parts:
            beside = places.of(f"{module}.bias")
            if beside is None or found[beside].shape != parts["bias"].shape:
                what = f"{label}: the adapter shifts the layer's bias, which is not in the model"
                problems.append(Problem(what, module))
                continue
            scale = scaling(config, module, parts["a"].shape[0])
            found[beside] = Shifted(found[beside], parts["bias"], scale, stamp)
    if problems:
        raise MismatchError(problems, "the adapter does not fit its model")
    rank = {parts["b"].shape[1] for parts in modules.values() if "b" in parts}
    notes = [f"the adapter changes {updated} tensors (rank {_range(rank)})"] if updated else []
    if replaced:
        notes.append(f"the adapter replaces {', '.join(sorted(replaced))}")
    return Applied(found, tuple(notes), changes)


def scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    """What the product of a module's factors is multiplied with: alpha / r, or alpha / sqrt(r)."""
    alpha = float(_by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", rank)))
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _by_pattern(patterns: Any, module: str, default: Any) -> Any:
    """PEFT's rule: a pattern is a regular expression for the end of the module's name."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _refuse_kinds(config: Mapping[str, Any], label: str) -> None:
    kind = config.get("peft_type", "LORA")
    hint = "Merge it into its base with PEFT first."
    if kind != "LORA":
        what = f"its adapter is of the kind {kind}; LoRA is applied here"
        raise SourceError(what, model=label, hint=hint)
    for key, words in (
        ("trainable_token_indices", "single tokens of its own (trainable_token_indices)"),
        ("layer_replication", "layers that it repeats (layer_replication)"),
        ("target_parameters", "parameters that are no layer's weight (target_parameters)"),
        ("megatron_config", "Megatron layers"),
    ):
        if config.get(key):
            raise SourceError(f"its adapter has {words}, which are not applied here", model=label,
                              hint=hint)  # fmt: skip


def sorted_out(stored: Mapping[str, TensorRef]) -> tuple[dict[str, Parts], Parts]:
    """Factors by module, and tensors that replace the model's, by name."""
    modules: dict[str, Parts] = {}
    whole: Parts = {}
    for name, ref in stored.items():
        plain = name.removeprefix(PREFIX)
        for ending, part in _FACTORS.items():
            if plain.endswith(f".{ending}"):
                modules.setdefault(plain.removesuffix(f".{ending}"), {})[part] = ref
                break
        else:
            # Names of PEFT's wrappers: today's, and those of version 0.4 and before.
            for wrapper in (".base_layer", ".modules_to_save.default"):
                plain = plain.replace(wrapper, "")
            whole[plain] = ref
    return modules, whole


def _unusable(weight: Tensor, parts: Parts, config: Mapping[str, Any]) -> str:
    """Why a module's factors do not fit its weight; empty when they do."""
    if "bias" in parts and "magnitude" in parts:
        return "DoRA with biases of its own (lora_bias) is not applied here"
    embedding = "embedding_a" in parts
    names = ("embedding_a", "embedding_b") if embedding else ("a", "b")
    missing = [name for name in names if name not in parts]
    if missing:
        return f"the adapter lacks a factor ({', '.join(missing)})"
    if weight.dtype not in MERGEABLE or weight.dtype == "F64":
        return f"its weight ({weight.native}) cannot be updated"
    if len(weight.shape) != 2 or any(len(parts[name].shape) != 2 for name in names):
        return f"only matrices are updated, not {list(weight.shape)}"
    a, b = (parts[name].shape for name in names)
    wanted = (b[0], a[1])
    if embedding or config.get("fan_in_fan_out"):
        wanted = (a[1], b[0])
    if a[0] != b[1] or wanted != weight.shape:
        return f"factors {list(a)} and {list(b)} do not make {list(weight.shape)}"
    if "magnitude" in parts and (embedding or config.get("fan_in_fan_out")):
        return "DoRA is not applied to embeddings and to layers that are stored [in, out]"
    return ""


def _update(
    weight: Tensor, parts: Parts, config: Mapping[str, Any], module: str, stamp: str
) -> Updated:
    if "embedding_a" in parts:
        a, b = parts["embedding_a"], parts["embedding_b"]
        return Updated(weight, a, b, scaling(config, module, a.shape[0]), True, None, stamp)
    a, b = parts["a"], parts["b"]
    scale = scaling(config, module, a.shape[0])
    if config.get("fan_in_fan_out"):
        return Updated(weight, a, b, scale, True, None, stamp)
    return Updated(weight, b, a, scale, False, parts.get("magnitude"), stamp)


def _range(values: set[int]) -> str:
    if not values:
        return "?"
    return str(min(values)) if len(values) == 1 else f"{min(values)} to {max(values)}"


class _Places:
    """A module's tensor in the model: under its own name, or where only a prefix differs."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._ends: dict[str, list[str]] = {}
        for name in tensors:
            for end in _ends(name):
                self._ends.setdefault(end, []).append(name)

    def of(self, name: str) -> str | None:
        if name in self._tensors:
            return name
        parts = name.split(".")
        for i, end in enumerate(_ends(name)):
            if i and parts[i - 1].isdigit():
                return None  # without its layer's number it could be any layer's
            found = self._ends.get(end, [])
            if found:
                return found[0] if len(found) == 1 else None
        return None


def _ends(name: str) -> Iterator[str]:
    """The name, and what is left of it without its first parts; at least two parts."""
    parts = name.split(".")
    for i in range(len(parts) - 1):
        yield ".".join(parts[i:])
