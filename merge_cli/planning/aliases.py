"""Tied weights that files store several times: every source gets the copies that the reference has.

FLAN-T5's file has its embedding three times (`shared`, `encoder.embed_tokens`,
`decoder.embed_tokens`); a fine-tune that transformers has saved has it once; BERT's head is its
embedding again. A source that lacks a copy uses the one that it has. All copies of the output are
made by the same formula, with the same settings and the same random numbers, so that they stay
equal. The output stores those that the reference stores.

heads.py does this for the output heads of language models.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import methodcaller

from merge_cli.checkpoint.config import text_config
from merge_cli.checkpoint.tensors import has_names
from merge_cli.planning.absent import AbsentTensors
from merge_cli.planning.equal_tensors import Copies
from merge_cli.planning.heads import HEADS
from merge_cli.planning.skeleton import class_rules
from merge_cli.sources.source import Source

# What a tensor ends with -> what stands in the place of that in names of its copies.
_COPIES_OF = {
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
        output_names = [name for name in group if name in names[reference]]
        names_there = [[name for name in group if name in tensors] for tensors in names]
        shapes = [
            {tensors[n].shape for n in has} for has, tensors in zip(names_there, names, strict=True)
        ]
        if (
            not output_names
            or not all(names_there)
            or any(len(shapes_there) > 1 for shapes_there in shapes)
        ):
            continue  # no copies; or a source has none of them, which is told like any lack
        of |= dict.fromkeys(output_names[1:], output_names[0])
        lenders, droppers = [], []
        for i, has in enumerate(names_there):
            tensors = names[i]
            source = tensors[has[0]]
            if len(has) > 1:
                stored += [Copies(source, tensors[n], n not in output_names) for n in has[1:]]
            if has != output_names:
                lenders += [sources[i].label] * any(name not in has for name in output_names)
                droppers += [sources[i].label] * any(name not in output_names for name in has)
                names[i] = {
                    **{name: ref for name, ref in tensors.items() if name not in group},
                    **{name: tensors.get(name, source) for name in output_names},
                }
        if len(output_names) > 1 or lenders or droppers:
            notes.append(_note(output_names, lenders, droppers, sources[reference].label))
    changed = (
        source if names_there is source.tensors else replace(source, tensors=names_there)
        for source, names_there in zip(sources, names, strict=True)
    )
    return Aliases(tuple(changed), of, tuple(stored), tuple(notes))


def _note(
    output_names: Sequence[str], lenders: Sequence[str], droppers: Sequence[str], reference: str
) -> str:
    note = f"{', '.join(output_names)}: one tensor, as {reference} stores it"
    if lenders:
        note += f"; {', '.join(lenders)} stores it under fewer names, or others"
    if droppers:
        note += f"; further copies of {', '.join(droppers)} are left out"
    return note


def _groups(sources: Sequence[Source], reference: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Names that may be one tensor, the one that the others are copies of first."""
    shared = sources[reference].tensors
    every = dict.fromkeys(_candidates(shared))
    for source in sources:
        if not has_names(shared, source.tensors):
            every |= dict.fromkeys(_candidates(source.tensors.keys() - shared.keys()))
    grouped: set[str] = set()
    embeddings = [name for name in every if name.endswith(_EMBEDDING)]
    heads = tuple(name for name in every if name.endswith(_HEADS))
    if len(embeddings) == 1 and heads:
        grouped |= {embeddings[0], *heads}
        yield embeddings[0], heads
    for name in every:
        end = next((end for end in _COPIES_OF if _ends(name, end)), None)
        if end is not None:
            root = name.removesuffix(end)
            copies = tuple(root + other for other in _COPIES_OF[end] if root + other in every)
            if copies and grouped.isdisjoint(copies):
                grouped |= {name, *copies}
                yield name, copies
    yield from _by_class(sources, reference, grouped)


_ENDS = (*_COPIES_OF, *(end for ends in _COPIES_OF.values() for end in ends), _EMBEDDING, *_HEADS)


def _candidates(names: Iterable[str]) -> list[str]:
    """Names that the rules above are about; most of a model's are not looked at twice."""
    return sorted(filter(methodcaller("endswith", _ENDS), names))


def _by_class(
    sources: Sequence[Source], reference: int, grouped: set[str]
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """What the reference's class ties, of tensors that some source lacks."""
    names = sources[reference].tensors
    if all(has_names(source.tensors, names) for source in sources):
        return
    everywhere = names.keys() & set.intersection(*(set(source.tensors) for source in sources))
    absent = AbsentTensors(sources)
    groups: dict[str, list[str]] = {}
    for name in names:
        if name in everywhere or name in grouped or name.endswith(HEADS):
            continue
        lacking = [i for i, source in enumerate(sources) if name not in source.tensors]
        if absent.by_config(name, reference, lacking):
            continue
        other = class_rules(sources[reference].config).tied_to(name)
        if other is None or other not in names or other in grouped:
            continue
        if names[other].shape == names[name].shape:
            groups.setdefault(other, []).append(name)
    yield from ((first, tuple(copies)) for first, copies in groups.items())


def _ties(source: Source, name: str) -> bool:
    config_part = text_config(source.config)
    if name.endswith("shared.weight") and config_part.get("model_type") in _ALWAYS:
        return True
    settings = [config.get("tie_word_embeddings") for config in (source.config, config_part)]
    return next((bool(word) for word in settings if word is not None), True)


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")
