"""An adapter's updates of experts, put onto a model that stores them together or one by one.

Where shapes tell which side of a product is which, they decide; where a matrix is square, the
version of PEFT that the config names does.

An adapter's updates of experts: which parameters they are of, and each expert's factors.

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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merge_cli.checkpoint.dtypes import MERGEABLE
from merge_cli.checkpoint.headers import TensorRef
from merge_cli.checkpoint.tensors import Tensor, Zeros
from merge_cli.lora.config import DEFAULT_ALPHA, by_pattern
from merge_cli.lora.expert_factors import MatrixUpdate, MatrixView, PatchedTensor

# Models whose experts transformers holds as [inputs, outputs] and says so (`is_transposed`).
_TRANSPOSED = frozenset(("gpt_oss", "aria", "aria_text", "openai_privacy_filter"))
# Stored as [inputs, outputs], whatever the class does with it.
_STORED_TURNED = _TRANSPOSED | {"llama4", "llama4_text", "qwen3_vl_moe", "qwen3_vl_moe_text"}


def apply_fused(
    update: ExpertUpdate, module: str, tensors: Mapping[str, Tensor], about: About
) -> dict[str, Tensor] | str:
    """The tensors that a parameter's update changes; or why there are none.

    Args:
        module: where the model's files have it.
    """
    names = (f"{module}.{update.parameter}", f"{module}.{update.parameter}.weight")
    together = next((name for name in names if name in tensors), "")
    if together:
        weight = tensors[together]
        if len(weight.shape) != 3:
            return f"only stacks of matrices are updated so, not {list(weight.shape)}"
        count, height, width = weight.shape
        stacked: list[Tensor] = [weight]
        rows: tuple[int, ...] = (height,)
    else:
        result = _stored_singly(module, update.parameter, tensors)
        if isinstance(result, str):
            return result
        experts, rows = result
        count, height, width = len(experts), sum(rows), experts[0][0].shape[1]
        stacked = [item for expert in experts for item in expert]
    why = _unusable(stacked)
    if why:
        return why
    factors = _of_experts(update, count, (height, width), about, bool(together))
    if isinstance(factors, str):
        return factors
    scale = scale_of(about.config, update.key, update.a.shape[0] // count)
    if together:
        patches = tuple(
            MatrixUpdate(left, right, scale, i) for i, (left, right) in enumerate(factors)
        )
        return {together: PatchedTensor(tensors[together], patches, about.stamp)}
    changed: dict[str, Tensor] = {}
    for expert, (left, right) in zip(experts, factors, strict=True):
        first = 0
        for weight, size in zip(expert, rows, strict=True):
            patch = MatrixUpdate(left.cut_rows(first, size), right, scale)
            changed[weight.name] = PatchedTensor(weight, (patch,), about.stamp)
            first += size
    return changed


def _unusable(weights: Sequence[Tensor]) -> str:
    bad = next((w for w in weights if w.dtype not in MERGEABLE or w.dtype == "F64"), None)
    return f"its weight ({bad.native}) cannot be updated" if bad is not None else ""


def _stored_singly(
    module: str, parameter: str, tensors: Mapping[str, Tensor]
) -> tuple[list[list[Tensor]], tuple[int, ...]] | str:
    """A parameter's experts, each as its parts, and the parts' heights."""
    for names in SINGLE.get(parameter, ()):
        experts: list[list[Tensor]] = []
        while all(f"{module}.{len(experts)}.{name}.weight" in tensors for name in names):
            number = len(experts)
            experts.append([tensors[f"{module}.{number}.{name}.weight"] for name in names])
        if experts:
            shapes = {tuple(one.shape for one in expert) for expert in experts}
            if len(shapes) > 1 or any(len(shape) != 2 for shape in next(iter(shapes))):
                return "the experts of the model are not of one shape"
            return experts, tuple(item.shape[0] for item in experts[0])
    return f"the adapter changes its {parameter}, the model lacks it"


def _of_experts(
    update: ExpertUpdate, count: int, shape: tuple[int, int], about: About, together: bool
) -> list[tuple[MatrixView, MatrixView]] | str:
    """Each expert's left and right factor, of a weight of this shape as it is stored."""
    a, b = update.a, update.b
    rank, odd = divmod(a.shape[0], count)
    outputs, inputs = b.shape[0], a.shape[1]
    if odd or not rank or b.shape[1] != a.shape[0]:
        return f"factors {list(a.shape)} and {list(b.shape)} are not those of {count} experts"
    said = rank_of(update, about.config)
    if said and said != rank:
        return f"its factors have the rank {rank}, and {said} is what adapter_config.json says"
    if shape not in ((outputs, inputs), (inputs, outputs)):
        return (
            f"factors {list(a.shape)} and {list(b.shape)} of {count} experts do not make "
            f"{list(shape)}"
        )
    turned = shape != (outputs, inputs)
    if outputs == inputs:
        known = _is_turned(about, together)
        if known is None:
            return "its matrices are square, and nothing tells which side is which"
        turned = known
    factors = []
    for expert in range(count):
        left, right = views(update, expert, count, rank)
        factors.append((right.turned, left.turned) if turned else (left, right))
    return factors


def _is_turned(about: About, together: bool) -> bool | None:
    """Whether a square matrix gets its update the other way round, from versions; None: unknown."""
    if about.model_type.startswith("qwen3_vl_moe") and together:
        return None  # held as [outputs, inputs] and stored as it comes
    version = version_of(about.config.get("peft_version"))
    transposed = about.model_type in _TRANSPOSED
    if version is None or version < (0, 19, 0):
        return True
    return transposed != (version == (0, 19, 0))


def single_target(
    name: str, tensors: Mapping[str, Tensor]
) -> tuple[str, int, str, tuple[str, ...]] | None:
    """Where one expert's layer lies in experts that are stored together; None if nowhere.

    Args:
        name: of the layer, where the model's files would have it: `...experts.7.gate_proj`.

    Returns:
        the stack's name, the expert, the layer, and the layers that share the stack.
    """
    result = re.fullmatch(r"(.*experts)\.(\d{1,6})\.(\w+)", name)
    if not result:
        return None
    module, number, layer = result.groups()
    for parameter, families in SINGLE.items():
        for layers in families:
            stack = next(
                (
                    n
                    for n in (f"{module}.{parameter}", f"{module}.{parameter}.weight")
                    if n in tensors
                ),
                "",
            )
            if layer in layers and stack:
                return stack, int(number), layer, layers
    return None


def apply_single(
    updates: Sequence[tuple[str, str, Parts]], tensors: Mapping[str, Tensor], about: About
) -> tuple[dict[str, Tensor], Iterator[tuple[str, str]]]:
    """Updates of single experts' layers, put onto stacks.

    Args:
        updates: the adapter's name of the layer, where the files would have it, and its factors.

    Returns:
        changed stacks, and problems: a layer and what is wrong.
    """
    patches: dict[str, list[MatrixUpdate]] = {}
    problems: list[tuple[str, str]] = []
    for own, name, parts in updates:
        target = single_target(name, tensors)
        assert target is not None
        stack, expert, layer, layers = target
        patch = _single_patch(
            own, parts, tensors[stack], expert, layers.index(layer), len(layers), about
        )
        if isinstance(patch, str):
            problems.append((own, patch))
        else:
            patches.setdefault(stack, []).append(patch)
    changed: dict[str, Tensor] = {}
    for stack, found in patches.items():
        found.sort(key=lambda patch: (patch.expert, patch.row, patch.column))
        changed[stack] = PatchedTensor(tensors[stack], tuple(found), about.stamp)
    return changed, iter(problems)


def _single_patch(
    own: str, parts: Parts, weight: Tensor, expert: int, part: int, count: int, about: About
) -> MatrixUpdate | str:
    if parts.keys() != {"a", "b"} or any(len(ref.shape) != 2 for ref in parts.values()):
        return "factors of an expert are two matrices, lora_A and lora_B"
    a, b = parts["a"], parts["b"]
    why = _unusable([weight])
    if why or len(weight.shape) != 3:
        return why or f"only stacks of matrices are updated so, not {list(weight.shape)}"
    outputs, inputs, rank = b.shape[0], a.shape[1], a.shape[0]
    if b.shape[1] != rank or not rank:
        return f"factors {list(a.shape)} and {list(b.shape)} do not belong together"
    experts, height, width = weight.shape
    if expert >= experts:
        return f"the model has {experts} experts"
    whole = (outputs * count, inputs)
    if whole not in ((height, width), (width, height)):
        return f"factors {list(a.shape)} and {list(b.shape)} do not make {list(weight.shape)}"
    if about.model_type.startswith("gpt_oss") and count > 1:
        return "gpt-oss stores gate and up in turns, so that single experts' layers have no block"
    turned = about.model_type in _STORED_TURNED
    if height != width:
        turned = whole != (height, width)
    scale = scale_of(about.config, own, rank)
    left, right = MatrixView.whole(b), MatrixView.whole(a)
    if turned:
        return MatrixUpdate(right.turned, left.turned, scale, expert, 0, part * outputs)
    return MatrixUpdate(left, right, scale, expert, part * outputs, 0)


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
    result, problems = [], {}
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
                result.append(ExpertUpdate(plain, parameter, parts["a"], parts["b"]))
    return result, problems


def in_order(parameters: Sequence[str]) -> list[str]:
    """A module's parameters as its class defines them: the order in which PEFT wraps them."""
    known = [name for name in _ORDER if name in parameters]
    return known + sorted(set(parameters) - set(known))


def changes_of_experts(
    updates: Sequence[ExpertUpdate], about: About, label: str
) -> dict[str, tuple[ExpertPosition, PatchedTensor]] | str:
    """Each expert's change as a matrix of its own, [outputs, inputs], or why there is none."""
    result = {}
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
            result[name] = ExpertPosition(update.module, update.parameter, i, count, shape), patched
    return result


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
    rank = by_pattern(config.get("rank_pattern"), update.key, config.get("r"))
    return rank if type(rank) is int else 0


def scale_of(config: Mapping[str, Any], key: str, rank: int) -> float:
    """What the product of a module's factors is multiplied with: alpha / r, or alpha / sqrt(r)."""
    given = config.get("lora_alpha", DEFAULT_ALPHA)
    alpha = float(by_pattern(config.get("alpha_pattern"), key, given))
    return float(alpha / rank**0.5) if config.get("use_rslora") else alpha / rank


def version_of(value: Any) -> tuple[int, ...] | None:
    if not isinstance(value, str):
        return None
    result = re.match(r"(\d{1,4})\.(\d{1,4})(?:\.(\d{1,4}))?", value)
    return tuple(int(part or 0) for part in result.groups()) if result else None
