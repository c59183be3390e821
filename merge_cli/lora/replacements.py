"""Tensors that the adapter brings in full: saved modules, biases, embeddings, and new heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from merge_cli.checkpoint.headers import TensorRef
from merge_cli.lora.adapter import why_no_replacement
from merge_cli.lora.draft import ModelDraft
from merge_cli.lora.heads import untie
from merge_cli.lora.targets import Targets
from merge_cli.lora.task_heads import add_task_head, is_task_head, labels


def replace_tensors(
    draft: ModelDraft, targets: Targets, config: Mapping[str, Any], base: Mapping[str, Any]
) -> None:
    """Replace the model's tensors by the adapter's; separate the head where the two then differ.

    Args:
        config: the adapter's.
        base: the model's config.
    """
    head = {
        name
        for name in targets.replacements
        if is_task_head(name) and targets.of(name, draft.tensors.keys()) is None
    }
    rest = {name: ref for name, ref in targets.replacements.items() if name not in head}
    trained = {name: ref for name, ref in rest.items() if targets.is_trained(name)}
    # What PEFT only saved along comes first: whether ends are tied is decided by what is trained.
    _replace(draft, targets, base, {n: ref for n, ref in rest.items() if n not in trained})
    if head:
        new = {name: targets.replacements[name] for name in targets.replacements if name in head}
        _add_head(draft, targets, config, base, new)
    else:
        _untie(draft, targets, config, base)
    _replace(draft, targets, base, trained)


def _replace(
    draft: ModelDraft,
    targets: Targets,
    base: Mapping[str, Any],
    replacements: Mapping[str, TensorRef],
) -> None:
    for name, ref in replacements.items():
        if targets.is_copy(name, ref.shape, untied=draft.untied):
            continue
        target = targets.of(name, draft.tensors.keys())
        if target is None:
            draft.refuse(name, "the adapter brings it, the model lacks it")
            continue
        why = why_no_replacement(ref, draft.tensors[target])
        if why:
            draft.refuse(name, why)
            continue
        shape = draft.tensors[target].shape
        if ref.shape != shape:
            if not _can_resize(targets, target, ref, shape):
                message = f"{list(ref.shape)} in the adapter, {list(shape)} in the model"
                draft.refuse(name, message)
                continue
            if is_task_head(target):
                draft.changes |= labels(base, ref.shape[0])
        draft.tensors[target] = ref._replace(name=target)
        draft.touched.add(target)


def _can_resize(targets: Targets, target: str, ref: TensorRef, shape: tuple[int, ...]) -> bool:
    """Whether a tensor may have another number of rows: of tokens, or of labels."""
    if len(ref.shape) != len(shape) or ref.shape[1:] != shape[1:]:
        return False
    embeddings = targets.embeddings
    stem = embeddings.head.removesuffix("weight")
    ends = (embeddings.embedding, f"{stem}weight", f"{stem}bias")
    return is_task_head(target) or target in ends


def _add_head(
    draft: ModelDraft,
    targets: Targets,
    config: Mapping[str, Any],
    base: Mapping[str, Any],
    replacements: Mapping[str, TensorRef],
) -> None:
    """Put a head for classes, which the model lacks, in the place of its language head."""
    for name, ref in replacements.items():
        if why := why_no_replacement(ref, None):
            draft.refuse(name, why)
    embedding = targets.embeddings.embedding
    width = draft.tensors[embedding].shape[1] if embedding else 0
    change = add_task_head(dict(replacements), base, config.get("task_type"), width, draft.label)
    draft.problems += change.problems
    draft.notes += change.notes
    draft.changes |= change.changes
    if change.tensors:
        stem = targets.embeddings.head.removesuffix("weight")
        for name in (f"{stem}weight", f"{stem}bias"):
            draft.tensors.pop(name, None)
    draft.tensors |= change.tensors


def _untie(
    draft: ModelDraft, targets: Targets, config: Mapping[str, Any], base: Mapping[str, Any]
) -> None:
    """Store the head beside the embedding where the adapter trains one of the two alone."""
    change = untie(
        draft.tensors,
        targets.embeddings,
        base,
        trained=targets.trained(),
        adapter=config,
        label=draft.label,
    )
    draft.tensors = change.tensors
    draft.changes |= change.changes
    draft.notes += change.notes
    draft.problems += change.problems
