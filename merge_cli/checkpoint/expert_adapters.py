"""An adapter's updates of experts: which parameters they are of, and each expert's factors.

    adapter                                 files
    experts.lora_A, experts.base_layer...   experts.gate_up_proj [experts, 2 * inner, hidden]
    (target_parameters: all at once)        experts.7.gate_proj.weight [inner, hidden], ...
    experts.7.gate_proj.lora_A, ...

transformers 5 holds a layer's experts as one parameter and stores most of them one by one. PEFT's
product B A of an expert is [outputs, inputs]; up to 0.19.0 it was added the other way round. Where
the shapes tell, they decide; where a matrix is square, the version that the config names does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merge_cli.checkpoint.adapter_config import DEFAULT_ALPHA, by_pattern
from merge_cli.checkpoint.expert_factors import MatrixUpdate, MatrixView, PatchedTensor
from merge_cli.checkpoint.header import TensorRef
from merge_cli.checkpoint.zeros import Zeros

Parts = dict[str, TensorRef]
_WRAPPER = ".base_layer"
# Parameters of transformers' experts in the order in which its classes define them, and what each
# is called where experts are stored one by one: parts of its rows, from the first on.
_ORDER = ("gate_up_proj", "gate_proj", "w1", "v1", "up_proj", "w3", "w2", "down_proj")
SINGLE = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3"), ("fc1", "fc3")),
    "down_proj": (("down_proj",), ("w2",), ("fc2",)),
}


@dataclass(frozen=True)
class ExpertUpdate:
    """A parameter's update: that of all its experts.

    Attributes:
        module: without PEFT's wrappers, as the adapter calls it.
        key: the module and the parameter, which patterns are matched with.
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
class About:
    """What decides how factors are read: the adapter's config, its base's, and the file's stamp."""

    config: Mapping[str, Any]
    model_type: str = ""
    stamp: str = ""


def fused_updates(
    modules: Mapping[str, Parts], config: Mapping[str, Any]
) -> tuple[list[ExpertUpdate], dict[str, str]]:
    """Updates of whole parameters (`target_parameters`), and modules of which none can be told.

    Returns:
        updates, and why not by module.
    """
    targets = config.get("target_parameters") or []
    nested: dict[str, list[str]] = {}
    for module in modules:
        plain = re.sub(rf"({re.escape(_WRAPPER)})+$", "", module)
        if module != plain or _is_stack(plain, targets):
            nested.setdefault(plain, []).append(module)
    found, problems = [], {}
    for plain, wrapped in nested.items():
        wrapped.sort(key=len, reverse=True)  # the innermost first: PEFT wrapped it first
        names = {target.rpartition(".")[2] for target in targets}
        named = [n for n in sorted(names) if any(_ends(f"{plain}.{n}", t) for t in targets)]
        listed = in_order([name for name in named if name in _ORDER] or named)
        if len(listed) != len(wrapped):
            said = ", ".join(targets) or "nothing"
            problems[plain] = (
                f"its factors are of {len(wrapped)} parameters, and target_parameters names {said}"
            )
            continue
        for module, parameter in zip(wrapped, listed, strict=True):
            parts = modules[module]
            if parts.keys() != {"a", "b"} or any(len(r.shape) != 2 for r in parts.values()):
                problems[plain] = "factors of experts are two matrices, lora_A and lora_B"
            else:
                found.append(ExpertUpdate(plain, parameter, parts["a"], parts["b"]))
    return found, problems


def in_order(parameters: Sequence[str]) -> list[str]:
    """A module's parameters as its class defines them: the order in which PEFT wraps them."""
    known = [name for name in _ORDER if name in parameters]
    return known + sorted(set(parameters) - set(known))


def changes_of_experts(
    updates: Sequence[ExpertUpdate], about: About, label: str
) -> dict[str, tuple[ExpertPosition, PatchedTensor]] | str:
    """Each expert's change as a matrix of its own, [outputs, inputs], or why there is none."""
    found = {}
    for update in updates:
        rank = rank_of(update, about.config)
        count, odd = divmod(update.a.shape[0], rank or 1)
        if not rank or odd or not count or update.b.shape[1] != update.a.shape[0]:
            return f"its factors of {update.key} are not those of experts of the rank that it names"
        shape = (update.b.shape[0], update.a.shape[1])
        scale = scale_of(about.config, update.key, rank)
        for i in range(count):
            name = f"{update.module}.{i}.{update.parameter}"
            left, right = views(update, i, count, rank)
            patched = PatchedTensor(
                Zeros(name, label, shape), (MatrixUpdate(left, right, scale),), about.stamp
            )
            found[name] = ExpertPosition(update.module, update.parameter, i, count, shape), patched
    return found


def is_newer(config: Mapping[str, Any]) -> bool:
    """Whether the PEFT that wrote it takes B A as [outputs, inputs]."""
    version = version_of(config.get("peft_version"))
    return version is not None and version > (0, 19, 0)


def views(
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
    """Of each expert's factors, as the config says; 0 where it does not."""
    found = by_pattern(config.get("rank_pattern"), update.key, config.get("r"))
    return found if type(found) is int else 0


def scale_of(config: Mapping[str, Any], key: str, rank: int) -> float:
    """What the product of a module's factors is multiplied with: alpha / r, or alpha / sqrt(r)."""
    given = config.get("lora_alpha", DEFAULT_ALPHA)
    alpha = float(by_pattern(config.get("alpha_pattern"), key, given))
    return float(alpha / rank**0.5) if config.get("use_rslora") else alpha / rank


def version_of(value: Any) -> tuple[int, ...] | None:
    if not isinstance(value, str):
        return None
    found = re.match(r"(\d{1,4})\.(\d{1,4})(?:\.(\d{1,4}))?", value)
    return tuple(int(part or 0) for part in found.groups()) if found else None
