"""Tied output heads: making sources agree on whether lm_head is the input embedding.

transformers does not store a tied head. Sources of one family may differ: the base tied, a
fine-tune not. Then the tied ones lend their embedding as head, the output stores its own, and its
config says so. Where every config ties, a head that is stored all the same is redundant:
transformers 4 replaces it when it loads the model, and 5 stores none that is not its own (see
`Source.ties`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from merge_cli.checkpoint.source import Source
from merge_cli.checkpoint.tensors import Tensor
from merge_cli.engine.copies import Copies

HEADS = ("lm_head.weight", "embed_out.weight")
EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "embed_in.weight",
    "shared.weight",
    "word_embeddings.weight",
    "tok_embeddings.weight",
    "embeddings.weight",
)

View = Mapping[str, Tensor]


@dataclass(frozen=True)
class TiedHeads:
    """The sources' tensors after reconciliation.

    Attributes:
        views: one for each source: name -> tensor, heads added or left out.
        tied: what the output's config must say; None leaves the donor's word.
        notes: what was done.
        stored: heads that are left out, with the embedding that stands in for each.
    """

    views: tuple[View, ...]
    tied: bool | None
    notes: tuple[str, ...]
    stored: tuple[Copies, ...] = ()


def reconcile_heads(sources: Sequence[Source]) -> TiedHeads:
    """Make every source either have the head or not."""
    head = next((n for s in sources for n in s.tensors if n.endswith(HEADS)), None)
    views: list[View] = [source.tensors for source in sources]
    if head is None:
        return TiedHeads(tuple(views), None, ())
    stored = [head in source.tensors for source in sources]
    embeddings = [_embedding(source, head) if source.ties(head) else None for source in sources]
    copies = tuple(
        Copies(source.tensors[embedding], source.tensors[head], dropped=True, tied=True)
        for source, embedding, has in zip(sources, embeddings, stored, strict=True)
        if has and embedding
    )
    if all(embeddings):
        notes: tuple[str, ...] = ()
        if any(stored):
            names = ", ".join(s.label for s, has in zip(sources, stored, strict=True) if has)
            notes = (f"{head}: left out, since every config ties it to the embedding ({names})",)
        trimmed = tuple({n: r for n, r in view.items() if n != head} for view in views)
        return TiedHeads(trimmed, None, notes, copies)
    lent = []
    for i, (source, embedding) in enumerate(zip(sources, embeddings, strict=True)):
        if embedding:  # even where one is stored: loading would replace it
            views[i] = {**source.tensors, head: source.tensors[embedding]}
            lent.append(source.label)
    notes = (
        (
            f"{head}: {', '.join(lent)} ties it to the embedding, which stands in for it; "
            "the output stores its own",
        )
        if lent
        else ()
    )
    return TiedHeads(tuple(views), False if lent else None, notes, copies)


def _embedding(source: Source, head: str) -> str | None:
    """The input embedding that a tied head would be; its shape is the head's where both exist."""
    found = [n for n, r in source.tensors.items() if n.endswith(EMBEDDINGS) and len(r.shape) == 2]
    stored = source.tensors.get(head)
    if stored is not None:
        found = [name for name in found if source.tensors[name].shape == stored.shape]
    # Encoders of multimodal models have embeddings, too; the head's neighbours come first.
    root = head.rpartition("lm_head")[0]
    return min(found, key=lambda name: (not name.startswith(root), len(name)), default=None)
