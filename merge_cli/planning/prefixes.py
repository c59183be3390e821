"""The same tensors under other prefixes: a language model, and the one inside a multimodal model.

`model.layers.0.mlp...` of a text-only fine-tune is `model.language_model.layers.0.mlp...` in a
model that also sees images, and `language_model.model.layers.0.mlp...` in older ones. Where
exchanging prefixes gives every tensor of a source exactly one name of the reference, it takes that
name.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from merge_cli.checkpoint.tensors import Tensor, has_names
from merge_cli.errors import MismatchError, Problem
from merge_cli.sources.source import Source

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class RenamedModel:
    """Sources with the reference's names.

    Attributes:
        notes: what was renamed.
    """

    sources: tuple[Source, ...]
    notes: tuple[str, ...] = ()


def rename(sources: Sequence[Source], reference: int) -> RenamedModel:
    """Give the sources the reference's names, where theirs differ by prefixes alone.

    Raises:
        MismatchError: two prefixes would do.
    """
    names = sources[reference].tensors
    renamed, notes = list(sources), []
    for i, source in enumerate(sources):
        if i == reference or has_names(names, source.tensors):
            continue
        rules = _rules(source, sources[reference])
        if rules is None:
            continue
        mapped = {_apply(name, rules): ref for name, ref in source.tensors.items()}
        renamed[i] = replace(source, tensors=mapped)
        shown = ", ".join(f"{old or '(none)'} -> {new or '(none)'}" for old, new in rules.items())
        notes.append(
            f"{source.label}: its tensors are {sources[reference].label}'s by prefix: {shown}"
        )
    return RenamedModel(tuple(renamed), tuple(notes))


def _rules(source: Source, reference: Source) -> dict[str, str] | None:
    """Old prefix -> new prefix for every tensor of the source; None where there are none.

    Raises:
        MismatchError: more than one new prefix fits.
    """
    tensors, names = source.tensors, reference.tensors
    groups: dict[str | None, list[str]] = {}
    for name in tensors:
        groups.setdefault(_stack_prefix(name), []).append(name)
    rules: dict[str, str] = {}
    for prefix, group in groups.items():
        if prefix is None:
            continue
        rests = [name.removeprefix(prefix) for name in group]
        fitting = [
            new
            for new in _prefixes(rests[0], names)
            if all(_fits(tensors[n], names.get(new + r)) for n, r in zip(group, rests, strict=True))
        ]
        fitting = _nearest(prefix, fitting)
        if not fitting:
            return None
        if len(fitting) > 1:
            prefixes = " and ".join(f"'{new}'" for new in fitting)
            message = f"{source.label}: its layers fit {reference.label}'s under {prefixes}"
            hint = "Rename its tensors, or merge with the model whose part it is."
            raise MismatchError([Problem(message, prefix, hint=hint)], "names are ambiguous")
        rules[prefix] = fitting[0]
    if not rules:
        return None
    for name in groups.get(None, ()):  # embeddings, norms, heads
        if _fits(tensors[name], names.get(_apply(name, rules))):
            continue
        exchanges = {
            rule for rule in _single_rules(name, tensors[name], names) if rule[0] not in rules
        }
        if len(exchanges) != 1:
            return None
        rules |= dict(exchanges)
    mapped = {_apply(name, rules) for name in tensors}
    return rules if len(mapped) == len(tensors) and mapped <= names.keys() else None


def _nearest(prefix: str, fitting: Sequence[str]) -> list[str]:
    """Those that end in most of the same words: an encoder is none of a decoder."""
    ends = {new: _common_end(prefix, new) for new in fitting}
    return [new for new in fitting if ends[new] == max(ends.values())]


def _common_end(first: str, second: str) -> int:
    """How many words two prefixes end in alike; more than any where they are the same."""
    if first == second:
        return len(first)
    words = zip(first.split(".")[-2::-1], second.split(".")[-2::-1], strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], words))


def _stack_prefix(name: str) -> str | None:
    """What stands before `layers.0.` (or `h.0.`); None for a tensor of no layer."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
    return "".join(f"{part}." for part in parts[: number - 1]) if number else None


def _prefixes(rest: str, names: Tensors) -> list[str]:
    """Everything that stands before this rest of a name in the reference."""
    return sorted({other[: -len(rest)] for other in names if _ends(other, rest)})


def _single_rules(name: str, tensor: Tensor, names: Tensors) -> Iterator[tuple[str, str]]:
    """Exchanges of prefixes that would do for one tensor, for the longest rest that has any."""
    parts = name.split(".")
    for i in range(len(parts)):
        rest = ".".join(parts[i:])
        fitting = [other for other in names if _ends(other, rest) and _fits(tensor, names[other])]
        for other in fitting:
            yield "".join(f"{part}." for part in parts[:i]), other[: -len(rest)]
        if fitting:
            return


def _ends(name: str, rest: str) -> bool:
    return name == rest or name.endswith(f".{rest}")


def _fits(tensor: Tensor, other: Tensor | None) -> bool:
    """Of one shape, but for the number of tokens."""
    if other is None or tensor.shape[1:] != other.shape[1:]:
        return False
    tokens = "embed" in other.name or "head" in other.name
    return tensor.shape[:1] == other.shape[:1] or tokens


def _apply(name: str, rules: Mapping[str, str]) -> str:
    """The longest old prefix that the name has, exchanged."""
    fitting = [old for old in rules if name.startswith(old)]
    if not fitting:
        return name
    old = max(fitting, key=len)
    return rules[old] + name.removeprefix(old)
