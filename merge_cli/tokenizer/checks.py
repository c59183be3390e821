"""What tokenizer files may hold: fields by their types, token numbers by their bounds.

Every field that is used is checked for its type and bounds; everything else is copied, or left to
the library that reads it. Token numbers become rows of an embedding, so they have a bound:

    0 <= number < rows + tokens      no two tokens of one number

A tokenizer may have tokens without a row in the embedding: numbered one after another, they stay
within that bound.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from merge_cli.system.untrusted import (
    Unreadable,
    kind_of,
    whole_number,
)

# The largest vocabularies have 300,000 tokens; a list of this size still fits into memory.
MAX_TOKENS = 10_000_000


def check_document(document: Mapping[str, Any]) -> None:
    """Check a tokenizer.json. The library `tokenizers` wants a model, too, and takes no null.

    Raises:
        Unreadable: a field of the wrong type, or a token number out of bounds.
    """
    model = document.get("model")
    if not isinstance(model, dict):
        raise Unreadable(f"model must be a mapping (got {kind_of(model)})")
    _field(model, "type", str, "text", "model.")
    listed = model.get("vocab")
    if isinstance(listed, list):  # unigram models list tokens with their scores
        if len(listed) > MAX_TOKENS:
            raise Unreadable(f"model.vocab lists {len(listed)} tokens (at most {MAX_TOKENS})")
        for number, entry in enumerate(listed):
            _check_scored(entry, f"model.vocab[{number}]")
    elif listed is not None:
        check_vocabulary(listed, "model.vocab")
    added = document.get("added_tokens", [])
    if not isinstance(added, list):
        raise Unreadable(f"added_tokens must be a list (got {kind_of(added)})")
    for number, token in enumerate(added):
        where = f"added_tokens[{number}]"
        if not isinstance(token, dict):
            raise Unreadable(f"{where} must be a mapping (got {kind_of(token)})")
        if not isinstance(token.get("content"), str):
            raise Unreadable(f"{where}.content must be text (got {kind_of(token.get('content'))})")
        whole_number(token.get("id"), f"{where}.id", most=MAX_TOKENS - 1)


def check_vocabulary(vocabulary: Any, where: str) -> None:
    """Check a mapping token -> number, as tokenizer.json, vocab.json, added_tokens.json have it.

    Raises:
        Unreadable: see `check_document`.
    """
    if not isinstance(vocabulary, dict):
        raise Unreadable(f"{where} must be a mapping (got {kind_of(vocabulary)})")
    numbers = vocabulary.values()
    whole = {*map(type, numbers)} <= {int}
    if whole and (not numbers or (min(numbers) >= 0 and max(numbers) < MAX_TOKENS)):
        return  # nothing is wrong; what is takes a look at each
    for token, number in vocabulary.items():
        whole_number(number, f"{where}: the number of {token[:60]!r}", most=MAX_TOKENS - 1)


def check_settings(settings: Mapping[str, Any], special: tuple[str, ...]) -> None:
    """Check a tokenizer_config.json.

    Args:
        special: the keys of its special tokens.

    Raises:
        Unreadable: see `check_document`.
    """
    for key in special:
        token = settings.get(key)
        content = token.get("content") if isinstance(token, dict) else token
        if content is not None and not isinstance(content, str):
            raise Unreadable(f"{key} must be text, or a mapping with it (got {kind_of(content)})")
    check_templates(settings)
    decoder = _field(settings, "added_tokens_decoder", dict, "a mapping") or {}
    for number, token in decoder.items():
        if not isinstance(token, dict):
            message = f"added_tokens_decoder.{number[:20]} must be a mapping (got {kind_of(token)})"
            raise Unreadable(message)


def check_templates(settings: Mapping[str, Any]) -> None:
    """Check the chat templates of a tokenizer_config.json or chat_template.json.

    Raises:
        Unreadable: neither text nor a list of names and texts.
    """
    stored = settings.get("chat_template")
    for number, entry in enumerate(stored if isinstance(stored, list) else ()):
        for key in ("name", "template"):
            value = entry.get(key) if isinstance(entry, dict) else None
            if not isinstance(value, str):
                message = (
                    f"chat_template[{number}] must have '{key}', a text (got {kind_of(entry)})"
                )
                raise Unreadable(message)
    if stored is not None and not isinstance(stored, str | list):
        raise Unreadable(f"chat_template must be text, or a list (got {kind_of(stored)})")


def _check_scored(entry: Any, where: str) -> None:
    fits = isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)
    if not fits or type(entry[1]) not in (int, float):
        raise Unreadable(f"{where} must be a token and its score (got {kind_of(entry)})")


def _field(mapping: Mapping[str, Any], key: str, kind: type, expected: str, where: str = "") -> Any:
    """A field of the expected kind; it may be missing or null."""
    value = mapping.get(key)
    if value is not None and not isinstance(value, kind):
        raise Unreadable(f"{where}{key} must be {expected} (got {kind_of(value)})")
    return value
