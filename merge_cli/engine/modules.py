"""Which tensors a `modules:` section means, found in their names, so that any architecture will do.

A module goes by mergekit's name for it or by a part of the tensors' own names, between dots:

    text_decoder, vision_tower, multi_modal_projector, audio_tower    by what a multimodal name says
    shared                    of encoder-decoder models: the shared embedding and the output head
    default                   what no other listed module has
    encoder, model.visual     tensors whose name has these parts
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

TEXT, DEFAULT, SHARED = "text_decoder", "default", "shared"
# The first kind that one of a name's parts belongs to; a projector may stand inside of a tower.
_KINDS = {
    "multi_modal_projector": frozenset(
        (
            "multi_modal_projector",
            "mm_projector",
            "vision_projector",
            "projector",
            "connector",
            "merger",
            "deepstack_merger_list",
            "aligner",
            "embed_vision",
            "embed_audio",
        )
    ),
    "vision_tower": frozenset(
        (
            "vision_tower",
            "vision_model",
            "visual",
            "vision_encoder",
            "image_encoder",
        )
    ),
    "audio_tower": frozenset(("audio_tower", "audio_model", "audio_encoder")),
}
_ALIASES = {"vision_model": "vision_tower", "visual": "vision_tower"}


def kind_of(name: str) -> str:
    """What a tensor of a multimodal model belongs to."""
    parts = frozenset(name.split("."))
    return next((kind for kind, words in _KINDS.items() if parts & words), TEXT)


def members(module: str, listed: Sequence[str], names: Iterable[str]) -> tuple[str, ...]:
    """The tensors of a module, in the model's order.

    Args:
        listed: every module of the recipe: `default` is what the others leave.
        names: all the model's tensors.
    """
    names = tuple(names)
    if module == DEFAULT:
        taken = {n for other in listed if other != DEFAULT for n in members(other, listed, names)}
        return tuple(name for name in names if name not in taken)
    kind = _ALIASES.get(module, module)
    if kind == TEXT or kind in _KINDS:
        found = tuple(name for name in names if kind_of(name) == kind)
        if found:
            return found
    parts = f".{module.strip('.')}."
    heads = (".lm_head.",) if module == SHARED else ()
    return tuple(n for n in names if any(part in f".{n}." for part in (parts, *heads)))


def known_modules(names: Iterable[str]) -> tuple[str, ...]:
    """Names that would mean something in a model, for a message."""
    kinds = dict.fromkeys(kind_of(name) for name in names)
    return tuple(kinds) if len(kinds) > 1 else (*kinds, DEFAULT)
