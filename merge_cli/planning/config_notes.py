"""Configs that give the same weights another meaning: a note for each key that differs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from merge_cli.checkpoint.class_config import written_out
from merge_cli.planning.config_meaning import FOR_ALL, Meaning, canonical
from merge_cli.sources.source import Source

_LENGTH = 60  # of a value in a line
_BEFORE = 20  # characters before the first that differs


def config_notes(
    sources: Sequence[Source], config_index: int, *, counts_layers: bool = True
) -> Iterator[str]:
    """A line for each key that does not mean the same in all sources, with every value.

    Args:
        config_index: of the source whose config the output has.
        counts_layers: whether all have the same layers: not where they are taken one by one.
    """
    described = [source for source in sources if source.config]
    if len({json.dumps(source.config, sort_keys=True) for source in described}) < 2:
        return
    meanings = [Meaning(source.config, counts_layers=counts_layers) for source in described]
    written: list[Meaning] = []  # filled where it is needed
    end = f"the output has that of {sources[config_index].label}"
    for key in dict.fromkeys(key for meaning in meanings for key in meaning.settings):
        alone = key in FOR_ALL or not any(key in meaning.around for meaning in meanings)
        pairs = [
            (meaning.value(key), source.label)
            for source, meaning in zip(described, meanings, strict=True)
            if alone or meaning.is_nested  # else it has no such part at all
        ]
        line = _difference(key, pairs)
        if line and (key in FOR_ALL or any(value is None for value, _ in pairs)):
            written = written or [*_written_out(described, meanings)]
            line = _unless_alike(key, written, line)
        if line:
            yield f"config.json: {line}; {end}"
    for key in sorted({key for meaning in meanings for key in meaning.hidden}):
        hidden = [
            (meaning.hidden[key], source.label)
            for source, meaning in zip(described, meanings, strict=True)
            if key in meaning.hidden
        ]
        if line := _difference(key, hidden):
            yield f"config.json: {line}; {end}"


def _difference(key: str, pairs: Sequence[tuple[Any, str]]) -> str:
    """Every value of a key, and who has it; empty where all are the same."""
    values, labels = list[Any](), dict[str, list[str]]()
    for value, label in pairs:
        same = labels.setdefault(canonical(value), [])
        values += [] if same else [value]
        same.append(label)
    if len(values) < 2:
        return ""
    path, shown = _where(key, values)
    told_by = zip(labels.values(), shown, strict=True)
    return f"{path} differs: " + "; ".join(f"{', '.join(who)} {text}" for who, text in told_by)


def _written_out(sources: Sequence[Source], meanings: Sequence[Meaning]) -> Iterator[Meaning]:
    """What transformers takes the configs to mean. It takes a second to ask.

    Old configs of Gemma 2 say nothing of what each layer is, and T5's class has one key for
    another.
    """
    for source, meaning in zip(sources, meanings, strict=True):
        config = written_out(source.config)
        yield meaning if config is None else Meaning(config)


def _unless_alike(key: str, written: Sequence[Meaning], line: str) -> str:
    """The line about a key that some leave out, if they do not mean the same all the same."""
    try:
        return line if len({canonical(meaning.plain_value(key)) for meaning in written}) > 1 else ""
    except KeyError:
        return line


def _where(path: str, values: Sequence[Any]) -> tuple[str, list[str]]:
    """Where values that are too long for a line first differ, and what each has there."""
    texts = [_text(value) for value in values]
    if max(map(len, texts)) <= _LENGTH:
        return path, texts
    if all(isinstance(value, list) for value in values) and len({*map(len, values)}) == 1:
        rows = enumerate(zip(*values, strict=True))
        index = next(i for i, row in rows if len({*map(canonical, row)}) > 1)
        return _where(f"{path}[{index}]", [value[index] for value in values])
    if all(isinstance(value, dict) for value in values):
        keys = dict.fromkeys(key for value in values for key in value)
        rows_by_key = {key: [value.get(key) for value in values] for key in keys}
        key = next(k for k, row in rows_by_key.items() if len({*map(canonical, row)}) > 1)
        return _where(f"{path}.{key}", rows_by_key[key])
    letters = enumerate(zip(*texts, strict=False))
    first = next((i for i, row in letters if len({*row}) > 1), min(map(len, texts)))
    begin = first - _BEFORE if first > _LENGTH - _BEFORE else 0
    return path, [_cut(text, begin) for text in texts]


def _cut(text: str, begin: int) -> str:
    """A piece of a long text, so that what differs is in it."""
    rest = text[begin : begin + _LENGTH]
    return f"{'...' if begin else ''}{rest}{'...' if begin + _LENGTH < len(text) else ''}"


def _text(value: Any) -> str:
    return "nothing" if value is None else canonical(value)
