"""New token numbers in configs, and a note where sources number tokens differently."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from merge_cli.checkpoint.config import text_config
from merge_cli.errors import CorruptFileError
from merge_cli.sources.source import Source
from merge_cli.tokenizer.aligned import AlignedVocabulary
from merge_cli.tokenizer.files import read_vocabulary


def renumber(config: Mapping[str, Any], aligned: AlignedVocabulary) -> dict[str, Any]:
    """A config, or generation settings, with the output's token numbers and number of rows."""

    def walk(section: Mapping[str, Any]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in section.items():
            if isinstance(value, dict):
                value = walk(value)
            elif aligned.ids is not None and key.endswith("_token_id"):
                value = _moved(value, aligned.ids)
            result[key] = value
        return result

    new = walk(config)
    text = text_config(new)
    if aligned.rows is not None and "vocab_size" in text:
        text["vocab_size"] = aligned.rows
    return new


def _moved(value: Any, ids: Mapping[int, int]) -> Any:
    if isinstance(value, list):
        return [_moved(element, ids) for element in value]
    return ids.get(value, value) if type(value) is int else value


def vocabulary_notes(sources: Sequence[Source]) -> Iterator[str]:
    """Notes on models whose rows mean other tokens, for recipes without a tokenizer section."""
    files = [source.root / "tokenizer.json" for source in sources]
    contents = [file.read_bytes() if file.is_file() else None for file in files]
    if len({text for text in contents if text is not None}) < 2:
        return
    vocabularies: list[tuple[Source, Mapping[str, int]]] = []
    for source, text in zip(sources, contents, strict=True):
        try:
            if text is not None:
                vocabularies.append((source, read_vocabulary(source)))
        except CorruptFileError as error:  # the merge goes on: the files are only copied
            yield f"{source.label}: {error.message}; its tokens may differ from the others'"
    for source, tokens in vocabularies[1:]:
        first, reference = vocabularies[0]
        by_number = {number: token for token, number in reference.items()}
        other = sum(by_number.get(number, token) != token for token, number in tokens.items())
        if other:
            yield (
                f"{source.label}: {other} of {len(tokens)} token numbers mean other tokens than in "
                f"{first.label}, and are merged all the same; `tokenizer: {{source: union}}` brings"
                " rows together by token"
            )
