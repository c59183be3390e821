"""An adapter's updates of experts: which tensors they change, and each expert's factors."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merge_cli.checkpoint.headers import TensorRef
from merge_cli.checkpoint.tensors import Zeros
from merge_cli.lora.adapter import Parts
from merge_cli.lora.config import configured_rank, scale_of
from merge_cli.lora.expert_factors import MatrixUpdate, MatrixView, PatchedTensor

_WRAPPER = ".base_layer"


# Parameters of transformers' experts in the order in which its classes define them, and the names
# of their parts, from the first row on, where experts are stored one by one.
_ORDER = ("gate_up_proj", "gate_proj", "w1", "v1", "up_proj", "w3", "w2", "down_proj")


@dataclass(frozen=True)
class ExpertUpdate:
    """The update of all experts of a parameter.

    Attributes:
        module: its name in the adapter, without PEFT's wrappers.
        key: the name that patterns of the config are matched with.
    """

    module: str
    parameter: str
    a: TensorRef
    b: TensorRef

    @property
    def key(self) -> str:
        return f"{self.module}.{self.parameter}"


@dataclass(frozen=True)
class ExpertPosition:
    """Where an expert's factors belong in an adapter.

    Attributes:
        count: how many experts the parameter has.
        shape: of an expert's product B A: [outputs, inputs].
    """

    module: str
    parameter: str
    expert: int
    count: int
    shape: tuple[int, int]


@dataclass(frozen=True)
class AdapterContext:
    """What decides how factors are read: the adapter's config, its base's model_type, and the
    fingerprint of the adapter's file."""

    config: Mapping[str, Any]
    model_type: str = ""
    fingerprint: str = ""


def fused_updates(
    modules: Mapping[str, Parts], config: Mapping[str, Any]
) -> tuple[list[ExpertUpdate], dict[str, str]]:
    """Updates of all experts of a parameter (`target_parameters`).

    Returns:
        the updates; and by module, why its factors cannot be read.
    """
    targets = config.get("target_parameters") or []
    nested: dict[str, list[str]] = {}
    for wrapped_module in modules:
        plain = re.sub(rf"({re.escape(_WRAPPER)})+$", "", wrapped_module)
        if wrapped_module != plain or _is_stack(plain, targets):
            nested.setdefault(plain, []).append(wrapped_module)
    updates, problems = [], {}
    for plain, wrapped in nested.items():
        wrapped.sort(key=len, reverse=True)  # the innermost first: PEFT wrapped it first
        names = {target.rpartition(".")[2] for target in targets}
        matching = [n for n in sorted(names) if any(_ends(f"{plain}.{n}", t) for t in targets)]
        listed = wrapping_order([name for name in matching if name in _ORDER] or matching)
        if len(listed) != len(wrapped):
            requested = ", ".join(targets) or "nothing"
            problems[plain] = (
                f"its factors are of {len(wrapped)} parameters, "
                f"and target_parameters names {requested}"
            )
            continue
        for wrapped_module, parameter in zip(wrapped, listed, strict=True):
            parts = modules[wrapped_module]
            if parts.keys() != {"a", "b"} or any(len(r.shape) != 2 for r in parts.values()):
                problems[plain] = "factors of experts are two matrices, lora_A and lora_B"
            else:
                updates.append(ExpertUpdate(plain, parameter, parts["a"], parts["b"]))
    return updates, problems


def wrapping_order(parameters: Sequence[str]) -> list[str]:
    """A module's parameters in the order in which PEFT wraps them: as its class defines them."""
    ordered = [name for name in _ORDER if name in parameters]
    return ordered + sorted(set(parameters) - set(ordered))


def changes_of_experts(
    updates: Sequence[ExpertUpdate], context: AdapterContext, label: str
) -> dict[str, tuple[ExpertPosition, PatchedTensor]] | str:
    """Each expert's change as a separate matrix [outputs, inputs], or why there is none."""
    changes = {}
    for update in updates:
        rank = rank_of(update, context.config)
        count, remainder = divmod(update.a.shape[0], rank or 1)
        if not rank or remainder or not count or update.b.shape[1] != update.a.shape[0]:
            return f"its factors of {update.key} are not those of experts of the rank that it names"
        shape = (update.b.shape[0], update.a.shape[1])
        scale = scale_of(context.config, update.key, rank)
        for i in range(count):
            name = f"{update.module}.{i}.{update.parameter}"
            left, right = expert_factors(update, i, count, rank)
            patched = PatchedTensor(
                Zeros(name, label, shape), (MatrixUpdate(left, right, scale),), context.fingerprint
            )
            changes[name] = (
                ExpertPosition(update.module, update.parameter, i, count, shape),
                patched,
            )
    return changes


def is_newer(config: Mapping[str, Any]) -> bool:
    """Whether the PEFT that wrote the adapter takes B A as [outputs, inputs]."""
    version = version_of(config.get("peft_version"))
    return version is not None and version > (0, 19, 0)


def expert_factors(
    update: ExpertUpdate, expert: int, count: int, rank: int
) -> tuple[MatrixView, MatrixView]:
    """An expert's B and A."""
    outputs, inputs = update.b.shape[0], update.a.shape[1]
    left = MatrixView(update.b, outputs, rank, expert, rank * count, count)
    return left, MatrixView(update.a, rank, inputs, expert * rank * inputs, inputs, 1)


def _is_stack(module: str, targets: Sequence[str]) -> bool:
    """Whether a module holds matrices of experts, and is no layer."""
    if module.rpartition(".")[2] == "experts":
        return True
    return any(
        name != "weight" and parent and _ends(f"{module}.{name}", target)
        for target in targets
        for parent, _, name in [target.rpartition(".")]
    )


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def rank_of(update: ExpertUpdate, config: Mapping[str, Any]) -> int:
    """The rank of each expert's factors in the config; 0 where it has none."""
    rank = configured_rank(config, update.key)
    return rank if type(rank) is int else 0


def version_of(value: Any) -> tuple[int, ...] | None:
    """The first three numbers of a version; None of anything else."""
    if not isinstance(value, str):
        return None
    match = re.match(r"(\d{1,4})\.(\d{1,4})(?:\.(\d{1,4}))?", value)
    return tuple(int(part or 0) for part in match.groups()) if match else None
