"""What an adapter changes, without the model: each module's update as a tensor of its own."""

from __future__ import annotations

from collections.abc import Mapping

from merge_cli.checkpoint.headers import TensorRef
from merge_cli.checkpoint.tensors import Zeros
from merge_cli.errors import SourceError
from merge_cli.lora import experts
from merge_cli.lora.adapter import Adapter, Parts, sort_contents
from merge_cli.lora.expert_factors import PatchedTensor
from merge_cli.lora.targets import apply_adapter
from merge_cli.lora.update import UpdatedTensor

_MERGE = "Merge the models themselves: `BASE+ADAPTER`, without `output: adapter`."


LowRank = (UpdatedTensor, PatchedTensor)  # changes that have factors


def changes_of(adapter: Adapter, label: str) -> dict[str, UpdatedTensor | PatchedTensor]:
    """Every module's update, by the name of the weight that it is of.

    Raises:
        SourceError: what depends on the model, or replaces a part of it; see `apply_adapter`.
        MismatchError: factors that do not fit one another.
    """
    contents = sort_contents(adapter.tensors)
    modules, brought = contents.modules, contents.whole
    fused, unknown = experts.fused_updates(modules, adapter.config)
    if unknown:
        module, why = next(iter(unknown.items()))
        raise SourceError(f"{module}: {why}", model=label, hint=_MERGE)
    about = experts.About(adapter.config, stamp=adapter.stamp)
    of_experts = experts.changes_of_experts(fused, about, label)
    if isinstance(of_experts, str):
        raise SourceError(of_experts, model=label, hint=_MERGE)
    stacks = {id(ref) for update in fused for ref in (update.a, update.b)}
    modules = {
        m: parts
        for m, parts in modules.items()
        if not any(id(ref) in stacks for ref in parts.values())
    }
    # A layer that has factors is frozen: PEFT saves a copy of embeddings beside theirs.
    whole = [name for name in brought if name.removesuffix(".weight") not in modules]
    if whole:
        message = f"it replaces tensors of its model ({whole[0]}, ...), which is no change"
        raise SourceError(f"{message} that can be merged without it", model=label, hint=_MERGE)
    if any("bias" in parts for parts in modules.values()):
        message = "its factors have biases (lora_bias), which are merged into a model alone"
        raise SourceError(message, model=label, hint=_MERGE)
    if any("magnitude" in parts for parts in modules.values()):
        message = "it is a DoRA adapter, whose change depends on the model"
        raise SourceError(message, model=label, hint=_MERGE)
    turned = bool(adapter.config.get("fan_in_fan_out"))
    zeros = {
        name: Zeros(name, label, shape)
        for module, parts in modules.items()
        if (shape := _shape(parts, turned)) and (name := f"{module}.weight")
    }
    factors = {ref.name: ref for parts in modules.values() for ref in parts.values()}
    changes: dict[str, UpdatedTensor | PatchedTensor] = {
        name: item for name, (_, item) in of_experts.items()
    }
    if factors or not fused:
        applied = apply_adapter(zeros, adapter.config, factors, label=label, stamp=adapter.stamp)
        changes |= {n: one for n, one in applied.tensors.items() if isinstance(one, UpdatedTensor)}
    return changes


def experts_of(adapter: Adapter) -> dict[str, experts.ExpertPosition]:
    """Where the changes of single experts belong, by their names in `changes_of`."""
    modules = sort_contents(adapter.tensors).modules
    fused, _ = experts.fused_updates(modules, adapter.config)
    result = experts.changes_of_experts(fused, experts.About(adapter.config), "")
    return {} if isinstance(result, str) else {name: place for name, (place, _) in result.items()}


def embeddings_of(adapter: Adapter) -> set[str]:
    """The weights of modules that look rows up."""
    modules = sort_contents(adapter.tensors).modules
    return {f"{module}.weight" for module, parts in modules.items() if "embedding_a" in parts}


def _shape(parts: Parts, turned: bool) -> tuple[int, ...]:
    """Of the weight; empty where a factor is missing, which applying says."""
    embedding = "embedding_a" in parts
    found: Mapping[str, TensorRef] = parts
    pair = [
        found.get(name) for name in (("embedding_a", "embedding_b") if embedding else ("a", "b"))
    ]
    if pair[0] is None or pair[1] is None or any(len(item.shape) != 2 for item in pair if item):
        return (1, 1)
    a, b = pair[0].shape, pair[1].shape
    return (a[1], b[0]) if embedding or turned else (b[0], a[1])
