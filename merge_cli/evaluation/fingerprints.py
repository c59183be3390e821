"""Which model is this? What caches of evaluations, teachers and statistics know a source by.

A folder on disk is known by its content, a model of the Hub by its commit.
"""

from __future__ import annotations

import hashlib
import json

from merge_cli.checkpoint.fingerprint import (
    cached_fingerprint,
    file_fingerprint,
    model_fingerprint,
)
from merge_cli.errors import SourceError
from merge_cli.lora.adapter import WEIGHTS
from merge_cli.sources.source import Source, require_safetensors


def source_fingerprint(source: Source) -> str:
    """`model_fingerprint` of an opened source, with that of its adapter.

    Raises:
        SourceError: its weights are in files that transformers does not load.
        OSError: a file cannot be read.
    """
    require_safetensors(source)
    return model_fingerprint(source.root) + _adapter_fingerprint(source)


def source_identity(source: Source) -> str:
    """`source_fingerprint`, or for a model of the Hub its commit: its weights need not be here yet.

    Raises:
        as `source_fingerprint` does.
    """
    require_safetensors(source)
    if source.repository is not None and source.repository.commit:
        commit = f"{source.repository.repo_id}@{source.repository.commit}"
        return commit + _adapter_fingerprint(source)
    return source_fingerprint(source)


def remembered_identity(source: Source) -> str | None:
    """`source_identity`, if it is known without reading weights; else None.

    For plans, which read headers alone. What is not remembered has never been run here, or was
    written a moment ago, so that no cache knows it either.

    Raises:
        as `source_fingerprint` does.
    """
    require_safetensors(source)
    adapter = source.adapter
    if adapter is not None and not (adapter.root / WEIGHTS).is_file():
        return None  # of the Hub, and not here yet
    if source.repository is not None and source.repository.commit:
        return source_identity(source)
    cached = cached_fingerprint(source.root)
    return None if cached is None else cached + _adapter_fingerprint(source)


def refuse_changed(source: Source, identity: str) -> None:
    """Raise if a model that has just been loaded is not the one that was looked at before.

    What is found with it would be remembered under the other one's name.

    Args:
        identity: `source_fingerprint` of before. A model of the Hub is what its commit says.

    Raises:
        SourceError: it has been written to meanwhile.
    """
    if source.repository is None and source_fingerprint(source) != identity:
        hint = "Run the command again when nothing writes to it."
        raise SourceError("has changed while it was loaded", model=source.label, hint=hint)


def _adapter_fingerprint(source: Source) -> str:
    """Of an adapter's weights and config; empty where there is none. Adapters are small."""
    if source.adapter is None:
        return ""
    config = json.dumps(source.adapter.config, sort_keys=True)
    weights = file_fingerprint(source.adapter.root / WEIGHTS)
    return "+" + hashlib.sha256(f"{config}{weights}".encode()).hexdigest()
