"""Stored copies of tied weights: several names of one tensor.

FLAN-T5's file has its embedding three times (`shared`, `encoder.embed_tokens`,
`decoder.embed_tokens`), a fine-tune that transformers has saved has it once; BERT's head is its
embedding again. A source that lacks a copy lends the one that it has. All copies of the output are
made by the same formula, with the same settings and the same random numbers, so that copies stay
copies. The output stores those that the reference stores.

Output heads of language models are the business of heads.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from merge_cli.checkpoint.config import text_config
from merge_cli.planning.absent import AbsentTensors
from merge_cli.planning.heads import HEADS, Copies
from merge_cli.planning.skeleton import class_rules
from merge_cli.sources.source import Source

# What a tensor ends with -> what stands in the place of that in names of its copies.
_BESIDE = {
    "shared.weight": ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
    "cls.predictions.bias": ("cls.predictions.decoder.bias",),
    "lm_head.bias": ("lm_head.decoder.bias",),
    "predictions.bias": ("predictions.decoder.bias",),
}
# Heads of encoders, which are the embedding of that name anywhere in the model.
_EMBEDDING = "embeddings.word_embeddings.weight"
_HEADS = (
    "cls.predictions.decoder.weight",
    "lm_head.decoder.weight",
    "predictions.decoder.weight",
    "generator_lm_head.weight",
    "vocab_projector.weight",
)
# Tied whatever the config says: there `tie_word_embeddings` is about the output head.
_ALWAYS = ("t5", "mt5", "umt5", "longt5", "switch_transformers", "pix2struct")


@dataclass(frozen=True)
class Aliases:
    """Sources whose copies are reconciled.

    Attributes:
        of: copy that the output stores -> the tensor whose formula makes it.
        stored: copies that sources store beside each other, to be compared before they are merged.
        notes: what was done.
    """

    sources: tuple[Source, ...]
    of: Mapping[str, str]
    stored: tuple[Copies, ...] = ()
    notes: tuple[str, ...] = ()


def join_aliases(sources: Sequence[Source], reference: int) -> Aliases:
    """Let every source have the copies that the reference stores, and no others."""
    names = [source.tensors for source in sources]
    of: dict[str, str] = {}
    stored: list[Copies] = []
    notes: list[str] = []
    for first, copies in _groups(sources, reference):
        group = (first, *copies)
        if not all(_ties(source, first) for source in sources):
            continue
        kept = [name for name in group if name in names[reference]]
        own = [[name for name in group if name in tensors] for tensors in names]
        shapes = [{tensors[n].shape for n in has} for has, tensors in zip(own, names, strict=True)]
        if not kept or not all(own) or any(len(found) > 1 for found in shapes):
            continue  # no copies; or a source has none of them, which is told like any lack
        of |= dict.fromkeys(kept[1:], kept[0])
        lent, dropped = [], []
        for i, has in enumerate(own):
            tensors = names[i]
            source = tensors[has[0]]
            if len(has) > 1:
                stored += [Copies(source, tensors[n], n not in kept) for n in has[1:]]
            if has != kept:
                lent += [sources[i].label] * any(name not in has for name in kept)
                dropped += [sources[i].label] * any(name not in kept for name in has)
                names[i] = {
                    **{name: ref for name, ref in tensors.items() if name not in group},
                    **{name: tensors.get(name, source) for name in kept},
                }
        if len(kept) > 1 or lent or dropped:
            notes.append(_told(kept, lent, dropped, sources[reference].label))
    changed = (
        source if own is source.tensors else replace(source, tensors=own)
        for source, own in zip(sources, names, strict=True)
    )
    return Aliases(tuple(changed), of, tuple(stored), tuple(notes))


def _told(kept: Sequence[str], lent: Sequence[str], dropped: Sequence[str], reference: str) -> str:
    note = f"{', '.join(kept)}: one tensor, as {reference} stores it"
    if lent:
        note += f"; {', '.join(lent)} stores it under fewer names, or others"
    if dropped:
        note += f"; further copies of {', '.join(dropped)} are left out"
    return note


def _groups(sources: Sequence[Source], reference: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Names that may be one tensor, the one that the others are copies of first."""
    shared = sources[reference].tensors
    every = dict.fromkeys(_candidates(shared))
    for source in sources:
        if source.tensors is not shared:
            every |= dict.fromkeys(_candidates(source.tensors.keys() - shared.keys()))
    known: set[str] = set()
    embeddings = [name for name in every if name.endswith(_EMBEDDING)]
    heads = tuple(name for name in every if name.endswith(_HEADS))
    if len(embeddings) == 1 and heads:
        known |= {embeddings[0], *heads}
        yield embeddings[0], heads
    for name in every:
        end = next((end for end in _BESIDE if _ends(name, end)), None)
        if end is not None:
            root = name.removesuffix(end)
            copies = tuple(root + other for other in _BESIDE[end] if root + other in every)
            if copies and known.isdisjoint(copies):
                known |= {name, *copies}
                yield name, copies
    yield from _by_class(sources, reference, known)


_ENDS = (*_BESIDE, *(end for ends in _BESIDE.values() for end in ends), _EMBEDDING, *_HEADS)


def _candidates(names: Iterable[str]) -> list[str]:
    """Names that the rules above are about; most of a model's are not looked at twice."""
    return sorted(name for name in names if name.endswith(_ENDS))


def _by_class(
    sources: Sequence[Source], reference: int, known: set[str]
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """What the reference's class ties, of tensors that some source lacks."""
    names = sources[reference].tensors
    if all(names.keys() <= source.tensors.keys() for source in sources):
        return
    everywhere = names.keys() & set.intersection(*(set(source.tensors) for source in sources))
    absent = AbsentTensors(sources)
    groups: dict[str, list[str]] = {}
    for name in names:
        if name in everywhere or name in known or name.endswith(HEADS):
            continue
        lacking = [i for i, source in enumerate(sources) if name not in source.tensors]
        if absent.by_config(name, reference, lacking):
            continue
        other = class_rules(sources[reference].config).tied_to(name)
        if other is None or other not in names or other in known:
            continue
        if names[other].shape == names[name].shape:
            groups.setdefault(other, []).append(name)
    yield from ((first, tuple(copies)) for first, copies in groups.items())


def _ties(source: Source, name: str) -> bool:
    about = text_config(source.config)
    if name.endswith("shared.weight") and about.get("model_type") in _ALWAYS:
        return True
    told = [config.get("tie_word_embeddings") for config in (source.config, about)]
    return next((bool(word) for word in told if word is not None), True)


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")
