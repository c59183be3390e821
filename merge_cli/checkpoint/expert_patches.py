"""An adapter's updates of experts, put onto a model that stores them together or one by one.

Where shapes tell which side of a product is which, they decide; where a matrix is square, the
version of PEFT that the config names does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from merge_cli.checkpoint.expert_adapters import (
    SINGLE,
    About,
    ExpertUpdate,
    Parts,
    rank_of,
    scale_of,
    version_of,
    views,
)
from merge_cli.checkpoint.expert_factors import MatrixUpdate, MatrixView, PatchedTensor
from merge_cli.checkpoint.header import MERGEABLE
from merge_cli.checkpoint.tensors import Tensor

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
        found = _stored_singly(module, update.parameter, tensors)
        if isinstance(found, str):
            return found
        experts, rows = found
        count, height, width = len(experts), sum(rows), experts[0][0].shape[1]
        stacked = [one for expert in experts for one in expert]
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
            return experts, tuple(one.shape[0] for one in experts[0])
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
    found = re.fullmatch(r"(.*experts)\.(\d{1,6})\.(\w+)", name)
    if not found:
        return None
    module, number, layer = found.groups()
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
