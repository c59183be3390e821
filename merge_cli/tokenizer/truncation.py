"""Embeddings and heads cut to the rows that every model has."""

from __future__ import annotations

from collections.abc import Sequence

from merge_cli.checkpoint.permuted_rows import PermutedRows, SourceRows
from merge_cli.checkpoint.tensors import Tensor, TensorMap
from merge_cli.sources.source import Source
from merge_cli.tokenizer.aligned import AlignedVocabulary
from merge_cli.tokenizer.embeddings import embedding_rows_of, is_vocabulary


def truncated(
    sources: Sequence[Source], tensors: Sequence[TensorMap], config_index: int
) -> AlignedVocabulary:
    """Every model with as many rows as the smallest has: mergekit's unsafe-truncate-embeddings."""
    import numpy as np

    embedding_rows = [
        embedding_rows_of(source, by_name) for source, by_name in zip(sources, tensors, strict=True)
    ]
    cut: list[dict[str, Tensor]] = [dict(by_name) for by_name in tensors]
    notes = []
    for name in filter(is_vocabulary, tensors[0]):
        parts = [by_name[name] for by_name in tensors if name in by_name]
        counts = [part.shape[0] if part.shape else 0 for part in parts]
        widths = {part.shape[1:] for part in parts}
        rows = min(counts)
        if len(parts) < len(tensors) or len(widths) > 1 or max(counts) == rows:
            continue
        for i, (shortened, count) in enumerate(zip(cut, counts, strict=True)):
            if count > rows:
                table = SourceRows(np.full(rows, i, np.int32), np.arange(rows, dtype=np.int64), {})
                shortened[name] = PermutedRows(parts[i], tuple(parts), table)
        longer = [f"{s.label} {n}" for s, n in zip(sources, counts, strict=True) if n > rows]
        notes.append(f"vocabulary: {name} is cut to {rows} rows ({', '.join(longer)})")
    if not notes:
        return AlignedVocabulary(
            tuple(tensors), config_index, notes=("vocabulary: nothing to truncate",)
        )
    notes.append(
        "vocabulary: cutting is right only where the same number means the same token in every "
        "model; the tokenizer's files stay as they are"
    )
    return AlignedVocabulary(
        tuple(cut), config_index, rows=min(embedding_rows), notes=tuple(notes), changed=True
    )
