"""An adapter's updates of experts: whose they are, and how they change a model's weights.

A model stores a layer's experts stacked in one tensor or one by one, and an adapter has factors of
either kind:

    adapter                                 files
    experts.lora_A, experts.base_layer...   experts.gate_up_proj [experts, 2 * inner, hidden]
    (target_parameters: all at once)        experts.7.gate_proj.weight [inner, hidden], ...
    experts.7.gate_proj.lora_A, ...

transformers 5 holds a layer's experts as one parameter and stores most of them one by one. PEFT's
product B A of an expert is [outputs, inputs]; up to 0.19.0 PEFT added its transpose. The shapes
decide which it is; for square matrices the version of PEFT does, which the config names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from merge_cli.checkpoint.dtypes import MERGEABLE
from merge_cli.checkpoint.tensors import Tensor
from merge_cli.lora.adapter import Parts
from merge_cli.lora.config import scale_of
from merge_cli.lora.expert_factors import MatrixUpdate, MatrixView, PatchedTensor
from merge_cli.lora.expert_updates import (
    AdapterContext,
    ExpertUpdate,
    expert_factors,
    rank_of,
    version_of,
)

# Models whose experts transformers holds as [inputs, outputs] and says so (`is_transposed`).
_TRANSPOSED = frozenset(("gpt_oss", "aria", "aria_text", "openai_privacy_filter"))
# Stored as [inputs, outputs], whatever the class does with it.
_STORED_TRANSPOSED = _TRANSPOSED | {"llama4", "llama4_text", "qwen3_vl_moe", "qwen3_vl_moe_text"}
SEPARATE_NAMES = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3"), ("fc1", "fc3")),
    "down_proj": (("down_proj",), ("w2",), ("fc2",)),
}


def apply_fused(
    update: ExpertUpdate, module: str, tensors: Mapping[str, Tensor], context: AdapterContext
) -> dict[str, Tensor] | str:
    """The tensors that a parameter's update changes; or why it cannot be applied.

    Args:
        module: its name in the model's files.
    """
    names = (f"{module}.{update.parameter}", f"{module}.{update.parameter}.weight")
    stacked_name = next((name for name in names if name in tensors), "")
    if stacked_name:
        weight = tensors[stacked_name]
        if len(weight.shape) != 3:
            return f"only stacks of matrices are updated so, not {list(weight.shape)}"
        count, height, width = weight.shape
        stacked: list[Tensor] = [weight]
        rows: tuple[int, ...] = (height,)
    else:
        separate = _separate_experts(module, update.parameter, tensors)
        if isinstance(separate, str):
            return separate
        experts, rows = separate
        count, height, width = len(experts), sum(rows), experts[0][0].shape[1]
        stacked = [tensor for expert in experts for tensor in expert]
    why = _unusable(stacked)
    if why:
        return why
    factors = _factors_of_experts(update, count, (height, width), context, bool(stacked_name))
    if isinstance(factors, str):
        return factors
    scale = scale_of(context.config, update.key, update.a.shape[0] // count)
    if stacked_name:
        patches = tuple(
            MatrixUpdate(left, right, scale, i) for i, (left, right) in enumerate(factors)
        )
        return {stacked_name: PatchedTensor(tensors[stacked_name], patches, context.fingerprint)}
    changed: dict[str, Tensor] = {}
    for expert, (left, right) in zip(experts, factors, strict=True):
        first = 0
        for weight, size in zip(expert, rows, strict=True):
            patch = MatrixUpdate(left.slice_rows(first, size), right, scale)
            changed[weight.name] = PatchedTensor(weight, (patch,), context.fingerprint)
            first += size
    return changed


def _unusable(weights: Sequence[Tensor]) -> str:
    bad = next((w for w in weights if w.dtype not in MERGEABLE or w.dtype == "F64"), None)
    return f"its weight ({bad.default_dtype}) cannot be updated" if bad is not None else ""


def _separate_experts(
    module: str, parameter: str, tensors: Mapping[str, Tensor]
) -> tuple[list[list[Tensor]], tuple[int, ...]] | str:
    """A parameter's experts, each as its tensors, and how many rows each of those has."""
    for names in SEPARATE_NAMES.get(parameter, ()):
        experts: list[list[Tensor]] = []
        while all(f"{module}.{len(experts)}.{name}.weight" in tensors for name in names):
            prefix = f"{module}.{len(experts)}"
            experts.append([tensors[f"{prefix}.{name}.weight"] for name in names])
        if experts:
            shapes = {tuple(tensor.shape for tensor in expert) for expert in experts}
            if len(shapes) > 1 or any(len(shape) != 2 for shape in next(iter(shapes))):
                return "the experts of the model are not of one shape"
            return experts, tuple(tensor.shape[0] for tensor in experts[0])
    return f"the adapter changes its {parameter}, the model lacks it"


def _factors_of_experts(
    update: ExpertUpdate,
    count: int,
    shape: tuple[int, int],
    context: AdapterContext,
    is_stacked: bool,
) -> list[tuple[MatrixView, MatrixView]] | str:
    """Each expert's left and right factor, as a stored weight of this shape needs them."""
    a, b = update.a, update.b
    rank, remainder = divmod(a.shape[0], count)
    outputs, inputs = b.shape[0], a.shape[1]
    if remainder or not rank or b.shape[1] != a.shape[0]:
        return f"factors {list(a.shape)} and {list(b.shape)} are not those of {count} experts"
    configured_rank = rank_of(update, context.config)
    if configured_rank and configured_rank != rank:
        return f"its factors have the rank {rank}, but adapter_config.json says {configured_rank}"
    if shape not in ((outputs, inputs), (inputs, outputs)):
        return (
            f"factors {list(a.shape)} and {list(b.shape)} of {count} experts do not make "
            f"{list(shape)}"
        )
    transposed = shape != (outputs, inputs)
    if outputs == inputs:
        is_transposed = _is_transposed(context, is_stacked)
        if is_transposed is None:
            return "its matrices are square, so that the shapes do not tell inputs from outputs"
        transposed = is_transposed
    factors = []
    for expert in range(count):
        left, right = expert_factors(update, expert, count, rank)
        factors.append((right.transposed, left.transposed) if transposed else (left, right))
    return factors


def _is_transposed(context: AdapterContext, is_stacked: bool) -> bool | None:
    """Whether a square matrix gets the transposed update, by PEFT's version; None: unknown."""
    if context.model_type.startswith("qwen3_vl_moe") and is_stacked:
        return None  # held as [outputs, inputs] and stored either way
    version = version_of(context.config.get("peft_version"))
    transposed = context.model_type in _TRANSPOSED
    if version is None or version < (0, 19, 0):
        return True
    return transposed != (version == (0, 19, 0))


def single_target(
    name: str, tensors: Mapping[str, Tensor]
) -> tuple[str, int, str, tuple[str, ...]] | None:
    """The stack that holds one expert's layer; None if no stack does.

    Args:
        name: the layer's name in the model's files: `...experts.7.gate_proj`.

    Returns:
        the stack's name, the expert, the layer, and the layers that share the stack.
    """
    match = re.fullmatch(r"(.*experts)\.(\d{1,6})\.(\w+)", name)
    if not match:
        return None
    module, number, layer = match.groups()
    for parameter, families in SEPARATE_NAMES.items():
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
    updates: Sequence[tuple[str, str, Parts]],
    tensors: Mapping[str, Tensor],
    context: AdapterContext,
) -> tuple[dict[str, Tensor], Iterator[tuple[str, str]]]:
    """Apply updates of single experts' layers to stacks.

    Args:
        updates: the layer's name in the adapter, its name in the files, and its factors.

    Returns:
        changed stacks, and problems: a layer and what is wrong.
    """
    patches: dict[str, list[MatrixUpdate]] = {}
    problems: list[tuple[str, str]] = []
    for module, name, parts in updates:
        target = single_target(name, tensors)
        assert target is not None
        stack, expert, layer, layers = target
        patch = _single_patch(
            module, parts, tensors[stack], expert, layers.index(layer), len(layers), context
        )
        if isinstance(patch, str):
            problems.append((module, patch))
        else:
            patches.setdefault(stack, []).append(patch)
    changed: dict[str, Tensor] = {}
    for stack, stack_patches in patches.items():
        stack_patches.sort(key=lambda patch: (patch.expert, patch.row, patch.column))
        changed[stack] = PatchedTensor(tensors[stack], tuple(stack_patches), context.fingerprint)
    return changed, iter(problems)


def _single_patch(
    module: str,
    parts: Parts,
    weight: Tensor,
    expert: int,
    part: int,
    count: int,
    context: AdapterContext,
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
    of_tensor = (outputs * count, inputs)
    if of_tensor not in ((height, width), (width, height)):
        return f"factors {list(a.shape)} and {list(b.shape)} do not make {list(weight.shape)}"
    if context.model_type.startswith("gpt_oss") and count > 1:
        return "gpt-oss interleaves gate and up, so that single experts' layers have no block"
    transposed = context.model_type in _STORED_TRANSPOSED
    if height != width:
        transposed = of_tensor != (height, width)
    scale = scale_of(context.config, module, rank)
    left, right = MatrixView.of_tensor(b), MatrixView.of_tensor(a)
    if transposed:
        return MatrixUpdate(right.transposed, left.transposed, scale, expert, 0, part * outputs)
    return MatrixUpdate(left, right, scale, expert, part * outputs, 0)
