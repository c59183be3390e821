"""Where in a model's files an adapter's tensors belong: one rule for the whole adapter.

PEFT calls modules as transformers does, and files call them as they did when they were written:
`model.language_model.layers.0...` is `language_model.model.layers.0...` in older files. Both towers
of a vision-language model have `layers.0.self_attn.q_proj`, so that the end of a name tells
nothing. A rule is an exchange of prefixes under which every tensor of the adapter has a place. They
are tried in this order: names as they are; the layouts below, each into each other one; what
transformers itself renames while it loads; one prefix for another, if only one would do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from merge_cli.checkpoint.class_config import empty_model
from merge_cli.system.untrusted import read_mapping


class NameLayout(NamedTuple):
    """How the parts of a model are called: the text model, its head, and all else."""

    text: str
    head: str = "lm_head."
    other: str = ""


LAYOUTS = (
    NameLayout("model."),  # a language model; Qwen2-VL's older files
    NameLayout("model.language_model.", other="model."),  # transformers 5
    NameLayout("language_model.model.", "language_model.lm_head."),  # before
    NameLayout("language_model.", other=""),  # a multimodal model without a head
    NameLayout("model.text_model.", other="model."),
    NameLayout("text_model.model.", "text_model.lm_head."),
    NameLayout("thinker.model.", "thinker.lm_head.", "thinker."),
    NameLayout("llm.model.", "llm.lm_head."),
    NameLayout(""),  # a model without a head
)
_IN_TEXT = re.compile(r"(layers\.\d|h\.\d|embed_tokens\.|wte\.|norm\.|ln_f\.|rotary_emb\.)")
# Names inside a layer that files and transformers 5 have differently.
_INSIDE = ((".mlp.", ".block_sparse_moe."), (".block_sparse_moe.", ".mlp."))
Rename = Callable[[str], str]


@dataclass(frozen=True)
class NameRule:
    """Adapter's name -> name in the files.

    Attributes:
        note: what it exchanges; empty where names are as they are.
        missed: names that have no place under it.
        rivals: prefixes between which nothing decides.
        crosses: whether it takes layers for text to a tower for images or sound, or back.
    """

    of: Rename
    note: str = ""
    missed: tuple[str, ...] = ()
    rivals: tuple[str, ...] = ()
    crosses: bool = False


def find_rule(
    names: Collection[str], have: Mapping[str, Any], root: Path | None = None
) -> NameRule:
    """The rule under which every name has a place; without one, that which misses fewest.

    Args:
        names: modules and tensors of the adapter that the model must have.
        have: the model's tensors.
        root: the model's folder, for what transformers knows of it.
    """
    places = _with_modules(have)
    rules = [NameRule(lambda name: name)]
    rules[0] = _tried(rules[0], names, places)
    if not rules[0].missed:
        return rules[0]
    for found in (
        _layouts(names, places),
        _transformers(names, have, places, root),
        _single(names, places),
    ):
        tried = [_tried(rule, names, places) for rule in found]
        landed = {tuple(map(rule.of, sorted(names))): rule for rule in tried if not rule.missed}
        if len(landed) == 1 and not (only := next(iter(landed.values()))).crosses:
            return only
        if len(landed) > 1:
            notes = tuple(rule.note for rule in landed.values())
            return NameRule(rules[0].of, "", tuple(sorted(names)), notes)
        rules += [rule for rule in tried if not rule.crosses]
    return min(rules, key=lambda rule: len(rule.missed))


def _with_modules(have: Iterable[str]) -> set[str]:
    """The tensors' names, and those of all modules around them."""
    result = set()
    for name in have:
        while name and name not in result:
            result.add(name)
            name = name.rpartition(".")[0]
    return result


def _tried(rule: NameRule, names: Collection[str], places: Collection[str]) -> NameRule:
    missed = tuple(sorted(name for name in names if rule.of(name) not in places))
    return replace(rule, missed=missed)


def _layouts(names: Collection[str], places: Collection[str]) -> Iterator[NameRule]:
    """Exchanges of one known layout for another, and of names inside the layers."""
    for old in LAYOUTS:
        if not all(name.startswith((old.text, old.head, old.other)) for name in names):
            continue
        if not any(_is_text(name, old) for name in names):
            continue
        for new in LAYOUTS:
            yield _exchange(old, new)
            yield from (_exchange(old, new, inside) for inside in _INSIDE)


def _is_text(name: str, layout: NameLayout) -> bool:
    """Whether a name is of the text model: what is there, in every architecture."""
    return name.startswith(layout.text) and bool(_IN_TEXT.match(name.removeprefix(layout.text)))


def _exchange(old: NameLayout, new: NameLayout, inside: tuple[str, str] | None = None) -> NameRule:
    def of(name: str) -> str:
        if _is_text(name, old):
            found = new.text + name.removeprefix(old.text)
        elif name.startswith(old.head):
            found = new.head + name.removeprefix(old.head)
        else:
            found = new.other + name.removeprefix(old.other)
        return found.replace(*inside) if inside else found

    pairs = [f"{a or '(none)'} -> {b or '(none)'}" for a, b in zip(old, new, strict=True) if a != b]
    pairs += [f"{inside[0]} -> {inside[1]}"] if inside else []
    return NameRule(of, ", ".join(dict.fromkeys(pairs)))


def _single(names: Collection[str], places: Collection[str]) -> Iterator[NameRule]:
    """One prefix for another, by the part of a layer's name that both have."""
    layered = [name for name in names if re.search(r"(^|\.)\d+\.", name)]
    if not layered:
        return
    first = min(layered)
    parts = first.split(".")
    number = next(i for i, part in enumerate(parts) if part.isdigit())
    old = "".join(f"{part}." for part in parts[: max(number - 1, 0)])
    rest = first.removeprefix(old)
    for other in sorted(places):
        if other == rest or other.endswith(f".{rest}"):
            new = other.removesuffix(rest)
            if new != old:
                note = f"{old or '(none)'} -> {new or '(none)'}"
                yield NameRule(_prefix(old, new), note, crosses=_tower(new) != _tower(old))


def _tower(prefix: str) -> str:
    """What a prefix says of the kind of input that the layers are for; empty for text."""
    kinds = {
        "vision": "vision",
        "visual": "vision",
        "vit": "vision",
        "image": "vision",
        "audio": "audio",
        "speech": "audio",
        "video": "video",
    }
    words = re.split(r"[._]", prefix)
    return next((kind for word, kind in kinds.items() if word in words), "")


def _prefix(old: str, new: str) -> Rename:
    return lambda name: new + name.removeprefix(old) if name.startswith(old) else name


def _transformers(
    names: Collection[str], have: Mapping[str, Any], places: Collection[str], root: Path | None
) -> Iterator[NameRule]:
    """What transformers renames while it loads this model's files, the other way round."""
    renamed = _live_names(have, root) if root is not None else {}
    stored: dict[str, str] = {}
    for name, live in renamed.items():  # and the modules around them, as far as they go together
        while name and live and stored.setdefault(live, name) == name:
            name, _, one = name.rpartition(".")
            live, _, other = live.rpartition(".")
            if one != other:
                break
    if any(name != live for live, name in stored.items()):
        yield NameRule(
            lambda name: stored.get(name, name), "as transformers renames it while loading"
        )


def _live_names(have: Iterable[str], root: Path) -> dict[str, str]:
    """Stored name -> transformers' own; empty where this transformers does not say."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:  # transformers 4 renames nothing in a way that can be asked for
        return {}
    try:
        net = empty_model(read_mapping(root / "config.json", "the base"))
        renamings = [
            item for item in get_model_conversion_mapping(net) if isinstance(item, WeightRenaming)
        ]
        own = net.state_dict()
        result = {
            name: rename_source_key(name, renamings, [], net.base_model_prefix, own)[0]
            for name in have
        }
    except Exception:
        # A class that this transformers lacks, a config that it refuses, or an interface that has
        # moved on: it knows nothing then.
        return {}
    return result
