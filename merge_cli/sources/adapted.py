"""A model with an adapter on it, as one model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from merge_cli.lora.adapter import open_adapter
from merge_cli.lora.application import apply_adapter
from merge_cli.lora.base_note import base_note
from merge_cli.lora.heads import changed_config
from merge_cli.recipe.reference import ModelRef
from merge_cli.sources.source import Source


def with_adapter(base: Source, model: ModelRef, folder: Path) -> Source:
    """The base with the adapter of `model` on it; nothing is computed yet.

    Args:
        folder: where relative paths start.

    Raises:
        SourceError: an adapter that cannot be read, or does not fit the base.
    """
    assert model.lora, "the model has an adapter"
    label = str(model)
    adapter = open_adapter(model.lora, model.lora_revision, folder, label)
    applied = apply_adapter(
        base.tensors,
        adapter.config,
        adapter.tensors,
        label=label,
        fingerprint=adapter.fingerprint,
        base=base.config,
        root=base.root,
    )
    other = base_note(adapter.config, base.label.partition("@")[0])
    notes = (*base.notes, *applied.notes, *([other] if other else []))
    return replace(
        base,
        label=label,
        tensors=applied.tensors,
        adapter=adapter,
        config=changed_config(base.config, applied.changes),
        notes=notes,
    )
