"""Factors put on the weights that they update: of single layers, and of experts."""

from __future__ import annotations

from merge_cli.lora import experts
from merge_cli.lora.adapter import Parts
from merge_cli.lora.config import scale_of
from merge_cli.lora.draft import ModelDraft
from merge_cli.lora.expert_updates import AdapterContext, ExpertUpdate
from merge_cli.lora.targets import Targets
from merge_cli.lora.update import ShiftedTensor, UpdatedTensor, update_weight, why_unusable


def update_layers(draft: ModelDraft, targets: Targets, context: AdapterContext) -> set[str]:
    """Factors of single layers. Returns the names of what changes."""
    changed: set[str] = set()
    separate = []
    for module, parts in targets.layers.items():
        name = f"{module}.weight"
        if targets.is_copy(name, None, untied=draft.untied):
            continue
        target = targets.of(name, draft.tensors.keys())
        layer = targets.rule.of(name).removesuffix(".weight")
        if target is None and experts.single_target(layer, draft.tensors):
            separate.append((module, layer, parts))
            continue
        if target is None:
            draft.refuse(module, "the adapter changes it, the model lacks it")
            continue
        why = _update(draft, targets, context, module, target, parts)
        if why:
            draft.refuse(module, why)
            continue
        changed.add(target)
    stacks, problems = experts.apply_single(separate, draft.tensors, context)
    for module, why in problems:
        draft.refuse(module, why)
    draft.tensors |= stacks
    return changed | stacks.keys()


def _update(
    draft: ModelDraft,
    targets: Targets,
    context: AdapterContext,
    module: str,
    target: str,
    parts: Parts,
) -> str:
    """Update one layer; why not, where it cannot be."""
    weight, config = draft.tensors[target], context.config
    if isinstance(weight, UpdatedTensor):
        return "two modules of the adapter change it"
    if len(weight.shape) == 3 and parts.keys() == {"a", "b"}:
        update = ExpertUpdate(module, "weight", parts["a"], parts["b"])
        changed = experts.apply_fused(
            update, target.removesuffix(".weight"), draft.tensors, context
        )
        if isinstance(changed, str):
            return changed
        draft.tensors |= changed
        return ""
    why = why_unusable(weight, parts, config, module, context.model_type)
    if why:
        return why
    draft.tensors[target] = update_weight(
        weight, parts, config, module, context.model_type, draft.fingerprint
    )
    draft.touched.add(target)
    if "bias" in parts:
        bias_name = targets.of(f"{module}.bias", draft.tensors.keys())
        if bias_name is None or draft.tensors[bias_name].shape != parts["bias"].shape:
            return "the adapter shifts the layer's bias, which is not in the model"
        scale = scale_of(config, module, parts["a"].shape[0])
        draft.tensors[bias_name] = ShiftedTensor(
            draft.tensors[bias_name], parts["bias"], scale, draft.fingerprint
        )
    return ""


def update_experts(draft: ModelDraft, targets: Targets, context: AdapterContext) -> set[str]:
    """Factors of all experts of a parameter. Returns the names of what changes."""
    changed: set[str] = set()
    for update in targets.fused:
        tensors = experts.apply_fused(
            update, targets.rule.of(update.module), draft.tensors, context
        )
        if isinstance(tensors, str):
            draft.refuse(update.module, tensors)
            continue
        draft.tensors |= tensors
        changed |= tensors.keys()
    return changed
