"""The union of tokenizers: the base's file, with the tokens that it lacks at the end.

Text is split as the base splits it. Added tokens (special tokens, chat markers) work as in the
model that they come from. Ordinary tokens get a number and rows, and can be decoded; a BPE
tokenizer does not split text into them, since its merges are the base's, which was trained with
that splitting. (Single characters need no merge: characters that the base writes as bytes are
recognised.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merge_cli.errors import SourceError
from merge_cli.sources.source import Source
from merge_cli.system.json_text import indented
from merge_cli.tokenizer.files import opaque_files, settings_json

_RARE = 10.0  # below the smallest score of a unigram model: chosen only where nothing else fits
_PLAIN = {
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": True,
    "special": False,
}


@dataclass(frozen=True)
class VocabularyUnion:
    """The joined tokenizer.

    Attributes:
        vocabulary: token -> number.
        files: the tokenizer files that differ from the base's.
        notes: for the plan.
    """

    vocabulary: Mapping[str, int]
    files: Mapping[str, bytes]
    notes: tuple[str, ...]


def join(
    base: Source,
    others: Sequence[tuple[Source, Mapping[str, int]]],
    base_tokens: Mapping[str, int],
    extra: Sequence[str],
    document_of: Callable[[Source], dict[str, Any]],
) -> VocabularyUnion:
    """The base's tokenizer with the tokens of the others, in their order, and extra tokens.

    Args:
        document_of: a model's tokenizer.json. The base's is changed.

    Raises:
        SourceError: the base's tokenizer cannot be read, or its kind takes no new tokens.
    """
    vocabulary = dict(base_tokens)
    missing = [token for _, tokens in others for token in tokens if token not in vocabulary]
    requested = [*dict.fromkeys([*missing, *(t for t in extra if t not in vocabulary)])]
    if not requested:
        return VocabularyUnion(vocabulary, {}, ())
    document = document_of(base)
    added = {token["content"]: token for token in document["added_tokens"]}
    from_others: dict[str, dict[str, Any]] = {}
    notes = []
    for source, tokens in others:
        their_added = _added_tokens(source, document_of)
        for token, traits in their_added.items():
            from_others.setdefault(token, traits)
        differs = [
            t
            for t, traits in their_added.items()
            if t in added and _traits(added[t]) != _traits(traits)
        ]
        if differs:
            notes.append(
                f"tokenizer: {', '.join(differs[:3])} has other settings in "
                f"{source.label}; those of {base.label} are used"
            )
        plain = [t for t in tokens if t not in base_tokens and t not in their_added]
        if plain:
            notes.append(
                f"tokenizer: {len(plain)} ordinary tokens of {source.label} get rows; text"
                f" is split as {base.label} splits it"
            )
    number = max(vocabulary.values(), default=-1) + 1
    listed = document["added_tokens"]
    # The package `tokenizers` renumbers added tokens, except those that the model has, too.
    for token in sorted(listed, key=lambda token: token["id"]):
        _grow(document["model"], token["content"], token["id"], base.label)
    for token in requested:
        vocabulary[token] = number
        _grow(document["model"], token, number, base.label)
        if token in from_others or token in extra and token not in missing:
            traits = from_others.get(token, {"content": token, **_PLAIN})
            listed.append({**traits, "id": number})
        number += 1
    files = {"tokenizer.json": indented(document).encode()}
    files |= _with_decoder(base, listed)
    return VocabularyUnion(vocabulary, files, tuple(notes))


def _grow(model: dict[str, Any], token: str, number: int, label: str) -> None:
    """Add a token with its number to the model, unless the model has it."""
    kind = model.get("type", "BPE")
    if kind == "Unigram":
        listed = model["vocab"]
        if number < len(listed) and listed[number][0] == token:
            return
        if number != len(listed):
            message = "its tokens are not numbered one after another, so that none can be added"
            raise SourceError(message, model=label)
        listed.append([token, min(score for _, score in listed) - _RARE])
    elif isinstance(model.get("vocab"), dict):
        model["vocab"].setdefault(token, number)
    else:
        raise SourceError(
            f"its tokenizer is of the kind {kind}, which takes no new tokens", model=label
        )


def _added_tokens(
    source: Source, document_of: Callable[[Source], dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    if not (source.root / "tokenizer.json").is_file() and not opaque_files(source):
        return {}
    listed = document_of(source)["added_tokens"]
    return {token["content"]: dict(token) for token in listed}


def _traits(token: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in token.items() if key != "id"}


def _with_decoder(base: Source, added: Sequence[Mapping[str, Any]]) -> dict[str, bytes]:
    """tokenizer_config.json with the added tokens, where it lists them."""
    config = settings_json(base)
    decoder = config.get("added_tokens_decoder")
    if decoder is None:
        return {}
    for token in added:
        decoder.setdefault(str(token["id"]), _traits(token))
    return {"tokenizer_config.json": (indented(config) + "\n").encode()}
