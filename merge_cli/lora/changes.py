"""What an adapter changes, without its model: the update of each module as a tensor."""

from __future__ import annotations

import re
from collections.abc import Iterator

from merge_cli.checkpoint.tensors import Zeros
from merge_cli.errors import SourceError
from merge_cli.lora import expert_updates
from merge_cli.lora.adapter import (
    EMBEDDING_FACTORS,
    LAYER_FACTORS,
    Adapter,
    Parts,
    sort_contents,
    unreadable_factors,
)
from merge_cli.lora.application import apply_adapter
from merge_cli.lora.expert_factors import PatchedTensor
from merge_cli.lora.selected import SelectedModules, name_ends
from merge_cli.lora.update import UpdatedTensor

_MERGE = "Merge the models themselves: `BASE+ADAPTER`, without `output: adapter`."


LowRank = (UpdatedTensor, PatchedTensor)  # changes that have factors


def changes_of(adapter: Adapter, label: str) -> dict[str, UpdatedTensor | PatchedTensor]:
    """The update of each module, by the name of the weight that it updates.

    Raises:
        SourceError: a change that depends on the model, or replaces a part of it.
        MismatchError: factors that do not fit one another.
    """
    contents = sort_contents(adapter.tensors)
    modules, replacements = contents.modules, contents.replacements
    for name, why in unreadable_factors(modules):
        raise SourceError(why, model=label, tensor=name)
    fused, unknown = expert_updates.fused_updates(modules, adapter.config)
    if unknown:
        module, why = next(iter(unknown.items()))
        raise SourceError(f"{module}: {why}", model=label, hint=_MERGE)
    context = expert_updates.AdapterContext(adapter.config, fingerprint=adapter.fingerprint)
    expert_changes = expert_updates.changes_of_experts(fused, context, label)
    if isinstance(expert_changes, str):
        raise SourceError(expert_changes, model=label, hint=_MERGE)
    stacks = {id(ref) for update in fused for ref in (update.a, update.b)}
    modules = {
        m: parts
        for m, parts in modules.items()
        if not any(id(ref) in stacks for ref in parts.values())
    }
    # A layer that has factors is frozen: PEFT also saves a copy of embeddings that have factors.
    replaced = [name for name in replacements if name.removesuffix(".weight") not in modules]
    if replaced:
        message = f"it replaces tensors of its model ({replaced[0]}, ...), which is no change"
        raise SourceError(f"{message} that can be merged without it", model=label, hint=_MERGE)
    if any("bias" in parts for parts in modules.values()):
        message = "its factors have biases (lora_bias), which are merged into a model alone"
        raise SourceError(message, model=label, hint=_MERGE)
    if any("magnitude" in parts for parts in modules.values()):
        message = "it is a DoRA adapter, whose change depends on the model"
        raise SourceError(message, model=label, hint=_MERGE)
    transposed = bool(adapter.config.get("fan_in_fan_out"))
    zeros = {
        name: Zeros(name, label, shape)
        for module, parts in modules.items()
        if (shape := _shape(parts, transposed)) and (name := f"{module}.weight")
    }
    factors = {ref.name: ref for parts in modules.values() for ref in parts.values()}
    changes: dict[str, UpdatedTensor | PatchedTensor] = {
        name: change for name, (_, change) in expert_changes.items()
    }
    if factors or not fused:
        applied = apply_adapter(
            zeros, adapter.config, factors, label=label, fingerprint=adapter.fingerprint
        )
        changes |= {n: t for n, t in applied.tensors.items() if isinstance(t, UpdatedTensor)}
    return changes


def experts_of(adapter: Adapter) -> dict[str, expert_updates.ExpertPosition]:
    """Where the changes of single experts belong, by their names in `changes_of`."""
    modules = sort_contents(adapter.tensors).modules
    fused, _ = expert_updates.fused_updates(modules, adapter.config)
    changes = expert_updates.changes_of_experts(
        fused, expert_updates.AdapterContext(adapter.config), ""
    )
    return (
        {}
        if isinstance(changes, str)
        else {name: position for name, (position, _) in changes.items()}
    )


def notes_of(adapter: Adapter) -> Iterator[str]:
    """What an adapter lacks or holds in vain, where its changes are merged without its model."""
    contents = sort_contents(adapter.tensors)
    if contents.replacements:
        names = ", ".join(contents.replacements)
        yield f"its copy of {names} is left out: the merged adapter goes onto the base's own"
    modules = [re.sub(r"(\.base_layer)+$", "", module) for module in contents.modules]
    ends = {end for module in modules for end in name_ends(module)}
    lacking = [name for name in SelectedModules(adapter.config).listed if name not in ends]
    if lacking:
        yield f"adapter_config.json names {', '.join(lacking)}, and it has no factors for that"


def embeddings_of(adapter: Adapter) -> set[str]:
    """The weights of modules that look rows up."""
    modules = sort_contents(adapter.tensors).modules
    return {f"{module}.weight" for module, parts in modules.items() if "embedding_a" in parts}


def _shape(parts: Parts, transposed: bool) -> tuple[int, ...]:
    """The weight's shape; [1, 1] where factors do not fit: `apply_adapter` reports those."""
    embedding = "embedding_a" in parts
    left, right = (parts.get(n) for n in (EMBEDDING_FACTORS if embedding else LAYER_FACTORS))
    if left is None or right is None or not len(left.shape) == len(right.shape) == 2:
        return (1, 1)
    a, b = left.shape, right.shape
    return (a[1], b[0]) if embedding or transposed else (b[0], a[1])
