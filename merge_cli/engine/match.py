"""Matching tensors across sources by name: which ones make which output tensor, and what is wrong.

Everything that does not fit is collected, so that one look shows all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from merge_cli.checkpoint.header import MERGEABLE, TensorRef
from merge_cli.checkpoint.source import Source
from merge_cli.engine.heads import View
from merge_cli.engine.layers import comes_after_layers, main_stack, place_of, stacks
from merge_cli.errors import Problem

# Buffers that old checkpoints stored and models compute by themselves.
_BUFFERS = ("rotary_emb.inv_freq", ".masked_bias", ".attn.bias", ".attention.bias",
            "position_ids", "rotary_emb.cos_cached", "rotary_emb.sin_cached")  # fmt: skip
# transformers itself calls this one of GPT-2's unexpected.
_LEFT_OUT = (".attn.masked_bias",)
_VOCABULARY = ("embed", "wte", "lm_head", "shared.weight")


@dataclass(frozen=True)
class Piece:
    """A run of output layers and where they come from.

    Attributes:
        operands: indexes of the sources, in the formula's order.
        reference: index of the source whose names the piece follows.
        ranges: for each source index, its half-open range of layers; None: the whole model.
        first, last: whether tensors before and after the layers come from this piece.
        start: the first output layer.
    """

    key: str
    operands: tuple[int, ...]
    base: int | None
    reference: int
    ranges: dict[int, tuple[int, int]] | None = None
    first: bool = True
    last: bool = True
    start: int = 0


@dataclass(frozen=True)
class Match:
    """One output tensor's sources. `position`: its layer's place in the piece, 0 to 1."""

    name: str
    piece: str
    group: str
    position: float
    operands: tuple[TensorRef, ...]
    base: TensorRef | None


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
    reference, view = sources[piece.reference], views[piece.reference]
    counts = stacks(view)
    stack = main_stack(view, reference.config) if piece.ranges else None
    if piece.ranges and stack is None:
        what = f"{reference.label}: cannot tell which of {sorted(counts)} its layers are"
        into.problems.append(Problem(what, piece.key))
        return
    members = [i for i in (piece.base, *piece.operands) if i is not None]
    for i in members:
        if piece.ranges and stack is not None:
            have, wanted = stacks(views[i]).get(stack, 0), piece.ranges[i][1]
            if wanted > have:
                what = f"{sources[i].label} has {have} layers, not {wanted}"
                into.problems.append(Problem(what, f"{piece.key}.layer_range"))
                return
    for name in view:
        place = place_of(name)
        in_stack = place is not None and place.stack == stack
        if piece.ranges and not in_stack:
            after = place is None and comes_after_layers(name)
            if not (piece.last if after else piece.first):
                continue
        if name.endswith(_LEFT_OUT):
            into.notes.append(f"{name}: left out; the model computes this buffer by itself")
            continue
        names = dict.fromkeys(members, name)
        output, position = name, 0.0
        if place is not None:
            layers = counts[place.stack]
            position = place.index / (layers - 1) if layers > 1 else 0.0
        if piece.ranges and in_stack and place is not None:
            low, high = piece.ranges[piece.reference]
            if not low <= place.index < high:
                continue
            offset = place.index - low
            output = place.name(piece.start + offset)
            position = offset / (high - low - 1) if high - low > 1 else 0.0
            names = {i: place.name(piece.ranges[i][0] + offset) for i in members}
        _match_tensor(piece, sources, views, names, output, position, into)
    if not piece.ranges:
        _report_extra(members, piece.reference, sources, views, into)


def _match_tensor(
    piece: Piece,
    sources: Sequence[Source],
    views: Sequence[View],
    names: dict[int, str],
    output: str,
    position: float,
    into: Matches,
) -> None:
    reference = views[piece.reference][names[piece.reference]]
    missing = [i for i, name in names.items() if name not in views[i]]
    if missing and output.endswith(_BUFFERS):
        # Nothing to merge: whoever has it gives it.
        found = [views[i][name] for i, name in names.items() if name in views[i]]
        into.notes.append(f"{output}: copied; not every source stores this buffer")
        into.found.append(Match(output, piece.key, _group(output), position, (found[0],), None))
        return
    for i in missing:
        what = f"missing from {sources[i].label}; {sources[piece.reference].label} has it"
        into.problems.append(Problem(what, names[i]))
    if missing:
        return
    refs = {i: views[i][name] for i, name in names.items()}
    if any(ref.shape != reference.shape for ref in refs.values()):
        shown = ", ".join(f"{sources[i].label} {list(ref.shape)}" for i, ref in refs.items())
        if _is_vocabulary(output, list(refs.values())):
            into.problems.append(Problem(f"the vocabularies differ in size: {shown}.", output,
                                         hint=_VOCABULARY_HINT))  # fmt: skip
        else:
            into.problems.append(Problem(f"the shapes differ: {shown}", output))
        return
    for i, ref in refs.items():
        if ref.dtype.startswith("F8"):
            what = f"{sources[i].label} stores it in {ref.dtype}, whose scales cannot be merged yet"
            into.problems.append(Problem(what, names[i], hint="Convert the model to bfloat16."))
            return
    base = refs[piece.base] if piece.base is not None else None
    operands = tuple(refs[i] for i in piece.operands)
    into.found.append(Match(output, piece.key, _group(output), position, operands, base))


_VOCABULARY_HINT = (
    "Rows would mean different tokens. Use models that share a vocabulary; or resize them with "
    "transformers' resize_token_embeddings first; or leave out the odd one."
)


def _is_vocabulary(name: str, refs: list[TensorRef]) -> bool:
    same_width = len({ref.shape[1:] for ref in refs}) == 1
    return same_width and any(part in name for part in _VOCABULARY)


def _report_extra(
    members: Sequence[int],
    reference: int,
    sources: Sequence[Source],
    views: Sequence[View],
    into: Matches,
) -> None:
    known = views[reference]
    for i in dict.fromkeys(members):
        for name in views[i]:
            if name in known:
                continue
            if name.endswith(_BUFFERS):
                into.notes.append(f"{name}: left out; the model computes this buffer by itself")
                continue
            label = sources[reference].label
            what = f"{sources[i].label} has it, {label} does not"
            into.problems.append(Problem(what, name))


def _group(name: str) -> str:
    place = place_of(name)
    return f"{place.stack}.{place.index}".lstrip(".") if place else name


def is_mergeable(match: Match) -> bool:
    """Whether every tensor is floating point; integers and booleans are copied."""
    refs = (*match.operands, *((match.base,) if match.base else ()))
    return all(ref.dtype in MERGEABLE for ref in refs)
