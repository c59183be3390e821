"""Which tensors have a row for each token, and how many."""

from __future__ import annotations

from collections.abc import Sequence

from merge_cli.checkpoint.config import text_config
from merge_cli.checkpoint.tensors import EMBEDDINGS, TensorMap
from merge_cli.errors import SourceError
from merge_cli.sources.source import Source

# Parts of the names of tensors with a row for each token, in any architecture.
_TOKEN_TENSORS = (
    "embed",
    "wte",
    "lm_head",
    "shared.weight",
    "output.weight",
    "decoder.weight",
    "decoder.bias",
    "predictions.bias",
    "final_logits_bias",
    "logits",
    "head",
)


def names_with_tokens(tensors: Sequence[TensorMap], embedding_rows: Sequence[int]) -> list[str]:
    """The tensors that have a row for each token, in every source."""

    def has(name: str) -> bool:
        return all(
            name in by_name and bool(by_name[name].shape) and by_name[name].shape[0] == rows
            for by_name, rows in zip(tensors, embedding_rows, strict=True)
        )

    return [name for name in tensors[0] if is_vocabulary(name) and has(name)]


def is_vocabulary(name: str) -> bool:
    """Whether a tensor's name is that of an embedding, a head, or a bias of one."""
    return any(word in name for word in _TOKEN_TENSORS) and "position" not in name


def embedding_rows_of(source: Source, tensors: TensorMap) -> int:
    """Rows of a source's input embedding.

    Raises:
        SourceError: it has none.
    """
    row_counts = [
        tensor.shape[0]
        for name, tensor in tensors.items()
        if name.endswith(EMBEDDINGS) and len(tensor.shape) == 2
    ]
    vocab_size = text_config(source.config).get("vocab_size")
    if isinstance(vocab_size, int) and vocab_size in row_counts:
        return vocab_size
    if not row_counts:
        raise SourceError(
            "has no input embedding whose rows could be rearranged", model=source.label
        )
    return max(row_counts)
