"""Output heads: sources agree on whether lm_head is tied to the input embedding.

transformers does not store a tied head. Sources of one family may differ: the base tied, a
fine-tune not. Then the embedding of the tied ones stands in for their head, the output stores its
own, and its config says so. Where every config ties, a stored head is redundant and left out:
transformers 4 replaces it when it loads the model, and 5 stores a head only where it is not tied
(see `Source.ties`). Where such a head is kept the output's config says that it is not tied, so that
every loader reads what transformers 5 reads.

Whether a stored head is a copy is not in the headers: see equal_tensors.py. A classifier is not
merged with a language model: one has `score` where the other has `lm_head`, and leaving one out
would make another model of both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import methodcaller

from merge_cli.checkpoint.tensors import EMBEDDINGS, TensorMap, has_names, same_names
from merge_cli.errors import Problem
from merge_cli.lora.task_heads import first_task_head
from merge_cli.planning.equal_tensors import Copies
from merge_cli.sources.source import Source

HEADS = ("lm_head.weight", "embed_out.weight")
# T5 and its kin: transformers 5 writes that all are tied, and reads whether outputs are scaled.
_SCALED = ("t5", "mt5", "umt5", "longt5", "pop2piano", "switch_transformers", "pix2struct", "udop")


@dataclass(frozen=True)
class TiedHeads:
    """The sources' tensors after reconciliation.

    Attributes:
        views: one for each source: name -> tensor, heads added or left out.
        tied: what the output's config must say; None leaves the config source's word.
        notes: what was done.
        stored: heads that are left out, with the embedding that stands in for each.
        lent: whether an embedding stands in for a head that the output stores.
    """

    views: tuple[TensorMap, ...]
    tied: bool | None
    notes: tuple[str, ...]
    stored: tuple[Copies, ...] = ()
    lent: bool = False


def reconcile_heads(sources: Sequence[Source]) -> TiedHeads:
    """Make every source either have the head or not."""
    head = _first_head(sources)
    tensors: list[TensorMap] = [source.tensors for source in sources]
    if head is None:
        return TiedHeads(tuple(tensors), None, ())
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
        trimmed = tuple(
            {n: r for n, r in tensors_there.items() if n != head} for tensors_there in tensors
        )
        return TiedHeads(trimmed, None, notes, copies)
    tied_labels = []
    for i, (source, embedding) in enumerate(zip(sources, embeddings, strict=True)):
        if embedding:  # even where one is stored: loading would replace it
            tensors[i] = {**source.tensors, head: source.tensors[embedding]}
            tied_labels.append(source.label)
    notes = (
        (
            f"{head}: {', '.join(tied_labels)} ties it to the embedding, which stands in for it; "
            "the output stores its own",
        )
        if tied_labels
        else ()
    )
    lent = bool(tied_labels)
    tied = False if lent or any(map(_says_tied, sources)) else None
    return TiedHeads(tuple(tensors), tied, notes, copies, lent)


def _says_tied(source: Source) -> bool:
    """Whether a config ties the head, whatever is stored."""
    configs = (source.config, source.config.get("text_config"))
    return source.config.get("model_type") not in _SCALED and any(
        isinstance(config, dict) and config.get("tie_word_embeddings") is True for config in configs
    )


def _first_head(sources: Sequence[Source]) -> str | None:
    """The first head that a source stores; names that an earlier source has are not seen twice."""
    for i, source in enumerate(sources):
        if any(has_names(earlier.tensors, source.tensors) for earlier in sources[:i]):
            continue
        head = next(filter(methodcaller("endswith", HEADS), source.tensors), None)
        if head is not None:
            return head
    return None


def _embedding(source: Source, head: str) -> str | None:
    """The input embedding that a tied head would be; its shape is the head's where both exist."""
    candidates = [
        n for n, r in source.tensors.items() if n.endswith(EMBEDDINGS) and len(r.shape) == 2
    ]
    stored = source.tensors.get(head)
    if stored is not None:
        candidates = [name for name in candidates if source.tensors[name].shape == stored.shape]
    # Encoders of multimodal models have embeddings, too; the head's neighbours come first.
    root = head.rpartition("lm_head")[0]
    return min(candidates, key=lambda name: (not name.startswith(root), len(name)), default=None)


def head_problems(sources: Sequence[Source]) -> list[Problem]:
    """A problem for each head that some of the models have, where others are language models."""
    heads = _heads(sources)
    if not any(heads) or all(heads):
        return []
    language = [
        source.label
        for source, head in zip(sources, heads, strict=True)
        if not head and _is_language_model(source)
    ]
    if not language:
        return []
    hint = (
        "Merge classifiers with one another: without `base_model` (linear, slerp, ...), or with "
        "one that has the same head. A base gets it as `BASE+ADAPTER`, from a reward adapter."
    )
    return [
        Problem(
            f"{source.label} classifies with it; {', '.join(language)} is a language model",
            head,
            hint=hint,
        )
        for source, head in zip(sources, heads, strict=True)
        if head
    ]


def _heads(sources: Sequence[Source]) -> list[str]:
    """The first tensor of each source's head for classes; empty for a model without one."""
    names = sources[0].tensors
    first = first_task_head(names)
    # As a rule all have the same names: they are looked through once.
    return [first if same_names(s.tensors, names) else first_task_head(s.tensors) for s in sources]


def _is_language_model(source: Source) -> bool:
    named = source.config.get("architectures")
    first = named[0] if isinstance(named, list) and named else ""
    return isinstance(first, str) and first.endswith(("ForCausalLM", "LMHeadModel"))
