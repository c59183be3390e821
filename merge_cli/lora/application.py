"""Applying a LoRA adapter to a model: which tensors it changes, and how.

    adapter_config.json         kind, rank, alpha, patterns (see lora/config.py)
    adapter_model.safetensors   base_model.model.MODULE.lora_A.weight, ...lora_B.weight, ...

Every tensor of the adapter is used; otherwise the adapter is refused, with the tensor's name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from merge_cli.checkpoint.headers import TensorRef
from merge_cli.checkpoint.tensors import Tensor
from merge_cli.errors import MismatchError, Problem, SourceError
from merge_cli.lora import expert_updates
from merge_cli.lora.adapter import WEIGHTS, AdapterContents, sort_contents, unreadable_factors
from merge_cli.lora.completeness import SAVE_AGAIN, Completeness
from merge_cli.lora.draft import ModelDraft
from merge_cli.lora.heads import match_rows
from merge_cli.lora.layers import update_experts, update_layers
from merge_cli.lora.replacements import replace_tensors
from merge_cli.lora.targets import Targets
from merge_cli.lora.update import contradictions

_BASE = "base_model_name_or_path"  # of the adapter's config


@dataclass(frozen=True)
class AppliedAdapter:
    """A model's tensors with an adapter.

    Attributes:
        tensors: all of them, by name.
        notes: what it did, for the plan.
        changes: keys of the model's config that follow.
    """

    tensors: Mapping[str, Tensor]
    notes: tuple[str, ...]
    changes: Mapping[str, Any] = field(default_factory=dict)


def apply_adapter(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    stored: Mapping[str, TensorRef],
    *,
    label: str,
    fingerprint: str,
    base: Mapping[str, Any] | None = None,
    root: Path | None = None,
) -> AppliedAdapter:
    """A model's tensors with an adapter: those that it changes are computed while they are read.

    Args:
        tensors: of the base model.
        config, stored: the adapter's.
        label: the model with its adapter, as the recipe names it.
        fingerprint: fingerprint of the adapter's weights.
        base: the base model's config.
        root: the base model's folder.

    Raises:
        SourceError: an adapter without tensors.
        MismatchError: all tensors of the adapter that do not fit the model.
    """
    if not stored:
        message = f"{WEIGHTS} holds no tensors: the adapter changes nothing"
        raise SourceError(message, model=label, hint="Save the adapter again.")
    contents, model_config = sort_contents(stored), base or {}
    targets = Targets(tensors, config, contents, model_config, root)
    if targets.rule.rivals:
        raise _ambiguous(targets, label)
    completeness = Completeness(targets, tensors, config)
    draft = ModelDraft(dict(tensors), label, fingerprint)
    for name, why in _contradictions(targets, contents, config):
        draft.refuse(name, why)
    for name, why in completeness.refusals():
        draft.refuse(name, why, SAVE_AGAIN)
    replace_tensors(draft, targets, config, model_config)
    replaced = sorted(draft.touched)
    context = expert_updates.AdapterContext(config, _model_type(model_config), fingerprint)
    changed = update_layers(draft, targets, context) | update_experts(draft, targets, context)
    _match_rows(draft, targets, tensors)
    if draft.problems:
        message, trained_on = "the adapter does not fit its model", config.get(_BASE)
        if isinstance(trained_on, str) and trained_on:
            message += f"; it says that it was trained on {trained_on}"
        raise MismatchError(draft.problems, message)
    notes = [f"the adapter changes {len(changed)} tensors (rank {_ranks(targets, config)})"]
    notes = notes if changed else []
    if replaced:
        notes.append(f"the adapter replaces {', '.join(replaced)}")
    if targets.rule.note:
        notes.append(f"the adapter's names are the model's by {targets.rule.note}")
    notes += [*draft.notes, *completeness.notes()]
    return AppliedAdapter(draft.tensors, tuple(notes), draft.changes)


def _model_type(base: Mapping[str, Any]) -> str:
    """The first one that the config names, its own or its language model's; else empty."""
    sections = (base, base.get("text_config"))
    types = (section.get("model_type") for section in sections if isinstance(section, dict))
    return next((kind for kind in types if isinstance(kind, str)), "")


def _ambiguous(targets: Targets, label: str) -> MismatchError:
    message = f"{label}: the adapter fits in more than one way: "
    hint = "Rename its tensors to the names in the model's files."
    message += "; or ".join(targets.rule.rivals)
    problem = Problem(message, targets.rule.missed[0], hint=hint)
    return MismatchError([problem], "the adapter's names are ambiguous")


def _contradictions(
    targets: Targets, contents: AdapterContents, config: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    """What is wrong with the adapter on any model: a tensor or module, and why."""
    for name in contents.duplicates:
        yield name, "the adapter holds it twice"
    yield from unreadable_factors(contents.modules)
    yield from targets.unknown.items()
    yield from contradictions(targets.layers, config)


def _match_rows(draft: ModelDraft, targets: Targets, before: Mapping[str, Tensor]) -> None:
    """Give embedding and head the same number of rows, and the config its vocabulary's size."""
    embeddings = targets.embeddings
    ends = {embeddings.embedding, embeddings.head}
    untouched = frozenset(name for name in ends if name and name not in draft.touched)
    notes, problems, rows = match_rows(draft.tensors, embeddings, untouched, draft.label)
    draft.notes += notes
    draft.problems += problems
    embedding = before.get(embeddings.embedding or "")
    if rows is not None and embedding is not None and rows != embedding.shape[0]:
        draft.changes["vocab_size"] = rows
        draft.notes.append(
            f"config.json: vocab_size: {embedding.shape[0]} -> {rows}, as the adapter's embedding;"
            " its tokenizer comes along where `tokenizer_source` names a model that has it"
        )


def _ranks(targets: Targets, config: Mapping[str, Any]) -> str:
    """The ranks of all factors: `16`, or `8 to 64`."""
    ranks = {parts["b"].shape[1] for parts in targets.layers.values() if "b" in parts}
    ranks |= {expert_updates.rank_of(u, config) or u.b.shape[1] for u in targets.fused}
    if not ranks:
        return "?"
    return str(min(ranks)) if len(ranks) == 1 else f"{min(ranks)} to {max(ranks)}"
