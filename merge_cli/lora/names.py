"""From an adapter's module names to the names in a model's files: one rule for all of them.

PEFT uses transformers' names, and files keep the names of the version that wrote them:
`model.language_model.layers.0...` is `language_model.model.layers.0...` in older files. Both towers
of a vision-language model have `layers.0.self_attn.q_proj`, so that the end of a name decides
nothing. A rule exchanges prefixes so that the model has every tensor of the adapter. Rules are
tried in this order: names as they are; the layouts below, each into each other one; what
transformers itself renames while it loads; one prefix for another, if only one does it.
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
    """Prefixes of a model's parts: the text model, its head, and everything else."""

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
        note: what it exchanges; empty where names stay as they are.
        missed: names that the model lacks under it.
        rivals: other rules that would do as well.
        crosses: whether it takes the text model's layers to a vision or audio tower, or back.
    """

    of: Rename
    note: str = ""
    missed: tuple[str, ...] = ()
    rivals: tuple[str, ...] = ()
    crosses: bool = False


def find_rule(
    names: Collection[str], tensors: Mapping[str, Any], root: Path | None = None
) -> NameRule:
    """The rule under which the model has every name; else the rule that misses fewest.

    Args:
        names: modules and tensors of the adapter that the model must have.
        tensors: the model's tensors.
        root: the model's folder, to ask transformers for its renames.
    """
    model_names = _with_modules(tensors)
    rules = [NameRule(lambda name: name)]
    rules[0] = _with_missed(rules[0], names, model_names)
    if not rules[0].missed:
        return rules[0]
    for family in (
        _layout_swaps(names, model_names),
        _transformers_renames(names, tensors, model_names, root),
        _prefix_swaps(names, model_names),
    ):
        candidates = [_with_missed(rule, names, model_names) for rule in family]
        complete = {
            tuple(map(rule.of, sorted(names))): rule for rule in candidates if not rule.missed
        }
        if len(complete) == 1 and not (only := next(iter(complete.values()))).crosses:
            return only
        if len(complete) > 1:
            notes = tuple(rule.note for rule in complete.values())
            return NameRule(rules[0].of, "", tuple(sorted(names)), notes)
        rules += [rule for rule in candidates if not rule.crosses]
    return min(rules, key=lambda rule: len(rule.missed))


def _with_modules(tensors: Iterable[str]) -> set[str]:
    """The tensors' names, and those of all modules around them."""
    names = set()
    for name in tensors:
        while name and name not in names:
            names.add(name)
            name = name.rpartition(".")[0]
    return names


def _with_missed(rule: NameRule, names: Collection[str], model_names: Collection[str]) -> NameRule:
    missed = tuple(sorted(name for name in names if rule.of(name) not in model_names))
    return replace(rule, missed=missed)


def _layout_swaps(names: Collection[str], model_names: Collection[str]) -> Iterator[NameRule]:
    """Exchanges of one of the layouts for another, and of names inside the layers."""
    for old in LAYOUTS:
        if not all(name.startswith((old.text, old.head, old.other)) for name in names):
            continue
        if not any(_is_text(name, old) for name in names):
            continue
        for new in LAYOUTS:
            yield _exchange(old, new)
            yield from (_exchange(old, new, inside) for inside in _INSIDE)


def _is_text(name: str, layout: NameLayout) -> bool:
    """Whether a name belongs to the text model, in any architecture."""
    return name.startswith(layout.text) and bool(_IN_TEXT.match(name.removeprefix(layout.text)))


def _exchange(old: NameLayout, new: NameLayout, inside: tuple[str, str] | None = None) -> NameRule:
    def of(name: str) -> str:
        if _is_text(name, old):
            renamed = new.text + name.removeprefix(old.text)
        elif name.startswith(old.head):
            renamed = new.head + name.removeprefix(old.head)
        else:
            renamed = new.other + name.removeprefix(old.other)
        return renamed.replace(*inside) if inside else renamed

    pairs = [f"{a or '(none)'} -> {b or '(none)'}" for a, b in zip(old, new, strict=True) if a != b]
    pairs += [f"{inside[0]} -> {inside[1]}"] if inside else []
    return NameRule(of, ", ".join(dict.fromkeys(pairs)))


def _prefix_swaps(names: Collection[str], model_names: Collection[str]) -> Iterator[NameRule]:
    """One prefix for another, by the part of a layer's name that both have."""
    layered = [name for name in names if re.search(r"(^|\.)\d+\.", name)]
    if not layered:
        return
    first = min(layered)
    parts = first.split(".")
    number = next(i for i, part in enumerate(parts) if part.isdigit())
    old = "".join(f"{part}." for part in parts[: max(number - 1, 0)])
    rest = first.removeprefix(old)
    for model_name in sorted(model_names):
        if model_name == rest or model_name.endswith(f".{rest}"):
            new = model_name.removesuffix(rest)
            if new != old:
                note = f"{old or '(none)'} -> {new or '(none)'}"
                yield NameRule(_prefix(old, new), note, crosses=_tower(new) != _tower(old))


def _tower(prefix: str) -> str:
    """The kind of input of the layers below a prefix; empty for text."""
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


def _transformers_renames(
    names: Collection[str],
    tensors: Mapping[str, Any],
    model_names: Collection[str],
    root: Path | None,
) -> Iterator[NameRule]:
    """The reverse of what transformers renames while it loads this model's files."""
    renamed = _live_names(tensors, root) if root is not None else {}
    stored: dict[str, str] = {}
    for name, live in renamed.items():  # and the modules around them, as far as they go together
        while name and live and stored.setdefault(live, name) == name:
            name, _, stored_part = name.rpartition(".")
            live, _, live_part = live.rpartition(".")
            if stored_part != live_part:
                break
    if any(name != live for live, name in stored.items()):
        yield NameRule(
            lambda name: stored.get(name, name), "as transformers renames it while loading"
        )


def _live_names(tensors: Iterable[str], root: Path) -> dict[str, str]:
    """Stored name -> transformers' name; empty where this version does not say."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except (ImportError, OSError):  # transformers 4 has no list of its renames
        return {}
    try:
        net = empty_model(read_mapping(root / "config.json", "the base"))
        renamings = [
            renaming
            for renaming in get_model_conversion_mapping(net)
            if isinstance(renaming, WeightRenaming)
        ]
        parameters = net.state_dict()
        live_names = {
            name: rename_source_key(name, renamings, [], net.base_model_prefix, parameters)[0]
            for name in tensors
        }
    except Exception:
        # This version of transformers lacks the class, refuses the config, or has changed.
        return {}
    return live_names
