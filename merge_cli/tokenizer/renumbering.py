"""What a new numbering of tokens means outside the weights: in configs, and where nobody asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from merge_cli.checkpoint.config import text_config
from merge_cli.errors import CorruptFileError
from merge_cli.sources.source import Source
from merge_cli.tokenizer.alignment import AlignedVocabulary
from merge_cli.tokenizer.files import read_vocabulary


def renumber(config: Mapping[str, Any], aligned: AlignedVocabulary) -> dict[str, Any]:
    """A config, or generation settings, with the output's token numbers and number of rows."""

    def walk(about: Mapping[str, Any]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in about.items():
            if isinstance(value, dict):
                value = walk(value)
            elif aligned.ids is not None and key.endswith("_token_id"):
                value = _moved(value, aligned.ids)
            result[key] = value
        return result

    new = walk(config)
    part = text_config(new)
    if aligned.rows is not None and "vocab_size" in part:
        part["vocab_size"] = aligned.rows
    return new


def _moved(value: Any, ids: Mapping[int, int]) -> Any:
    if isinstance(value, list):
        return [_moved(item, ids) for item in value]
    return ids.get(value, value) if type(value) is int else value


def vocabulary_notes(sources: Sequence[Source]) -> Iterator[str]:
    """Models whose rows mean other tokens, where the recipe says nothing of it."""
    files = [source.root / "tokenizer.json" for source in sources]
    contents = [file.read_bytes() if file.is_file() else None for file in files]
    if len({text for text in contents if text is not None}) < 2:
        return
    known: list[tuple[Source, Mapping[str, int]]] = []
    for source, text in zip(sources, contents, strict=True):
        try:
            if text is not None:
                known.append((source, read_vocabulary(source)))
        except CorruptFileError as error:  # no reason not to merge: the files are only copied
            yield f"{source.label}: {error.what}; whether its tokens are the others' is not known"
    for source, own in known[1:]:
        first, reference = known[0]
        by_number = {number: token for token, number in reference.items()}
        other = sum(by_number.get(number, token) != token for token, number in own.items())
        if other:
            yield (
                f"{source.label}: {other} of {len(own)} token numbers mean other tokens than in "
                f"{first.label}, and are merged all the same; `tokenizer: {{source: union}}` brings"
                " rows together by token"
            )
