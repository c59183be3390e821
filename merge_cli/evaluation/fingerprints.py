"""Which model is this? What caches of evaluations, teachers and statistics know a source by.

A folder on disk is known by its content, a model of the Hub by its commit.
"""

from __future__ import annotations

from merge_cli.checkpoint.fingerprint import cached_fingerprint, model_fingerprint
from merge_cli.errors import SourceError
from merge_cli.sources.source import Source, require_safetensors


def source_fingerprint(source: Source) -> str:
    """`model_fingerprint` of an opened source that is a model by itself.

    Raises:
        SourceError: it has an adapter, and its folder is that of the model without it.
        OSError: a file cannot be read.
    """
    require_folder(source)
    return model_fingerprint(source.root)


def source_identity(source: Source) -> str:
    """`source_fingerprint`, or for a model of the Hub its commit: its weights need not be here yet.

    Raises:
        as `source_fingerprint` does.
    """
    require_folder(source)
    if source.repository is not None and source.repository.commit:
        return f"{source.repository.repo_id}@{source.repository.commit}"
    return source_fingerprint(source)


def remembered_identity(source: Source) -> str | None:
    """`source_identity`, if it is known without reading weights; else None.

    For plans, which read headers alone. What is not remembered has never been run here, or was
    written a moment ago, so that no cache knows it either.

    Raises:
        as `source_fingerprint` does.
    """
    require_folder(source)
    if source.repository is not None and source.repository.commit:
        return source_identity(source)
    return cached_fingerprint(source.root)


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


def require_folder(source: Source) -> None:
    """What runs a model loads its folder with transformers: the folder must be the whole model.

    Raises:
        SourceError: an adapter belongs to it, or its weights are in files of another kind.
    """
    require_safetensors(source)
    if source.adapter is not None:
        message = "an adapter is applied while merging, and here the model is run"
        hint = "Merge the two into a folder first: `merge_method: passthrough`, one model."
        raise SourceError(message, model=source.label, hint=hint)
