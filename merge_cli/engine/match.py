"""Matching tensors across sources by name: which ones make which output tensor, and what is wrong.

Everything that does not fit is collected, so that one look shows all of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from merge_cli.checkpoint.header import MERGEABLE, TensorRef
from merge_cli.checkpoint.source import Source
from merge_cli.engine.heads import View
from merge_cli.engine.layers import comes_after_layers, main_stack, place_of, stacks
from merge_cli.errors import Problem
from merge_cli.recipe.schema import SliceSpec, SourceSpec

# Buffers that old checkpoints stored and models compute by themselves.
_BUFFERS = ("rotary_emb.inv_freq", ".masked_bias", ".attn.bias", ".attention.bias",
            "position_ids", "rotary_emb.cos_cached", "rotary_emb.sin_cached")  # fmt: skip
# transformers itself calls this one of GPT-2's unexpected.
_LEFT_OUT = (".attn.masked_bias",)
_VOCABULARY = ("embed", "wte", "lm_head", "shared.weight")


@dataclass(frozen=True)
class Operand:
    """One source's part in a piece. The same source may take part twice, with other layers.

    Attributes:
        source: its index among the opened sources.
        place: its place in the recipe, which random masks belong to; -1 for an unlisted base.
        layers: half-open range; None means the whole model.
    """

    source: int
    place: int
    spec: SourceSpec
    layers: tuple[int, int] | None = None


@dataclass(frozen=True)
class Piece:
    """A run of output layers and where they come from.

    Attributes:
        spec: the recipe's slice; None for a merge of whole models.
        operands: in the formula's order.
        first, last: whether tensors before and after the layers come from this piece.
        start: the first output layer.
    """

    key: str
    spec: SliceSpec | None
    operands: tuple[Operand, ...]
    base: Operand | None
    first: bool = True
    last: bool = True
    start: int = 0

    @property
    def reference(self) -> Operand:
        """Whose names the piece follows."""
        return self.base or self.operands[0]

    @property
    def members(self) -> tuple[Operand, ...]:
        """Everything that is read, the base first."""
        return (self.base, *self.operands) if self.base else self.operands


@dataclass(frozen=True)
class Match:
    """One output tensor.

    Attributes:
        position: its layer's place in the piece, 0 to 1.
        operands, base: the tensors of the formula; for a copy, the one that is copied.
        source: index of the source that `operands[0]` is from.
        copied: why it is copied, whatever the method; empty where it is merged.
    """

    name: str
    piece: Piece
    group: str
    position: float
    operands: tuple[TensorRef, ...]
    base: TensorRef | None
    source: int
    copied: str = ""


@dataclass
class Matches:
    """What matching found."""

    found: list[Match] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def match_piece(
    piece: Piece, sources: Sequence[Source], views: Sequence[View], into: Matches
) -> None:
    """Find every tensor of one piece in its sources; append what fits and what does not."""
    offers: list[dict[str, TensorRef]] = []
    for operand in piece.members:
        source = sources[operand.source]
        offer = _offered(piece, operand, views[operand.source], source, into)
        if offer is None:
            return
        offers.append(offer)
    reference = offers[0]
    counts = stacks(reference)
    owner = piece.reference.source
    stack = main_stack(views[owner], sources[owner].config) if piece.spec else None
    for name in reference:
        if name.endswith(_LEFT_OUT):
            into.notes.append(f"{name}: left out; the model computes this buffer by itself")
            continue
        place = place_of(name)
        position = 0.0
        if place is not None:
            first = piece.start if stack is not None and place.stack == stack else 0
            layers = counts[place.stack] - first
            position = (place.index - first) / (layers - 1) if layers > 1 else 0.0
        _match_tensor(piece, name, position, offers, sources, into)
    _report_extra(piece, offers, sources, into)


def _offered(
    piece: Piece, operand: Operand, view: View, source: Source, into: Matches
) -> dict[str, TensorRef] | None:
    """What a source gives to a piece, by output name; None (and a problem) if it cannot."""
    if operand.layers is None:
        return dict(view)
    stack = main_stack(view, source.config)
    if stack is None:
        what = f"{source.label}: cannot tell which of {sorted(stacks(view))} its layers are"
        into.problems.append(Problem(what, piece.key))
        return None
    low, high = operand.layers
    have = stacks(view).get(stack, 0)
    if high > have:
        what = f"{source.label} has {have} layers, not {high}"
        into.problems.append(Problem(what, f"{piece.key}.layer_range"))
        return None
    offer: dict[str, TensorRef] = {}
    for name, ref in view.items():
        place = place_of(name)
        if place is not None and place.stack == stack:
            if low <= place.index < high:
                offer[place.name(piece.start + place.index - low)] = ref
        elif piece.last if place is None and comes_after_layers(name, stack) else piece.first:
            offer[name] = ref
    return offer


def _match_tensor(
    piece: Piece,
    name: str,
    position: float,
    offers: Sequence[Mapping[str, TensorRef]],
    sources: Sequence[Source],
    into: Matches,
) -> None:
    members = piece.members
    present = [(m, offer[name]) for m, offer in zip(members, offers, strict=True) if name in offer]
    labels = [sources[member.source].label for member in members]

    def copy(why: str) -> Match:
        donor, ref = present[0]
        return Match(name, piece, _group(name), position, (ref,), None, donor.source, why)

    if len(present) < len(members):
        if name.endswith(_BUFFERS):
            into.found.append(copy("not every source stores this buffer: copied"))
            return
        for label, offer in zip(labels, offers, strict=True):
            if name not in offer:
                into.problems.append(Problem(f"missing from {label}; {labels[0]} has it", name))
        return
    refs = [ref for _, ref in present]
    if len({ref.shape for ref in refs}) > 1:
        sizes = [f"{a} {list(ref.shape)}" for a, ref in zip(labels, refs, strict=True)]
        shown = ", ".join(dict.fromkeys(sizes))
        if _is_vocabulary(name, refs):
            what = f"the vocabularies differ in size: {shown}."
            into.problems.append(Problem(what, name, hint=_VOCABULARY_HINT))
        else:
            into.problems.append(Problem(f"the shapes differ: {shown}", name))
        return
    for label, ref in zip(labels, refs, strict=True):
        if ref.dtype.startswith("F8"):
            what = f"{label} stores it in {ref.dtype}, whose scales cannot be merged yet"
            into.problems.append(Problem(what, name, hint="Convert the model to bfloat16."))
            return
    if not all(ref.dtype in MERGEABLE for ref in refs):
        into.found.append(copy(f"{refs[0].dtype} is not merged: copied"))
        return
    base = refs[0] if piece.base else None
    operands = tuple(refs[1:] if piece.base else refs)
    source = piece.operands[0].source
    into.found.append(Match(name, piece, _group(name), position, operands, base, source))


_VOCABULARY_HINT = (
    "Rows would mean different tokens. Use models that share a vocabulary; or resize them with "
    "transformers' resize_token_embeddings first; or leave out the odd one."
)


def _is_vocabulary(name: str, refs: Sequence[TensorRef]) -> bool:
    same_width = len({ref.shape[1:] for ref in refs}) == 1
    return same_width and any(part in name for part in _VOCABULARY)


def _report_extra(
    piece: Piece,
    offers: Sequence[Mapping[str, TensorRef]],
    sources: Sequence[Source],
    into: Matches,
) -> None:
    """Tensors that some source has and the reference lacks: none is dropped without a word."""
    known = sources[piece.reference.source].label
    seen: set[tuple[str, str]] = set()
    for member, offer in zip(piece.members, offers, strict=True):
        label = sources[member.source].label
        for name in offer.keys() - offers[0].keys():
            if (label, name) in seen:
                continue
            seen.add((label, name))
            if name.endswith(_BUFFERS):
                into.notes.append(f"{name}: left out; the model computes this buffer by itself")
            else:
                into.problems.append(Problem(f"{label} has it, {known} does not", name))


def _group(name: str) -> str:
    place = place_of(name)
    return f"{place.stack}.{place.index}".lstrip(".") if place else name
