"""The vocabulary of a GGUF file: tokens, their kinds, and those with a role."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merge_cli.system.untrusted import Unreadable, whole_number

PREFIX = "tokenizer.ggml."
_MAX_TOKENS = 9_999_999
# Kinds of tokens, as ggml numbers them.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_PADDING = re.compile(r"\[PAD\d+\]")  # rows of the embedding that have no token


@dataclass(frozen=True)
class StoredVocabulary:
    """The tokens of a file, checked.

    Attributes:
        numbers: token -> its number, without rows that have no token.
        kinds: of every token, by number.
        special: `bos`, `eos`, `unk`, `pad` -> the token, as far as the file names them.
    """

    tokens: Sequence[str]
    numbers: Mapping[str, int]
    kinds: Sequence[int]
    special: Mapping[str, str]


def vocabulary_of(values: Mapping[str, Any]) -> StoredVocabulary:
    """The vocabulary of a file.

    Args:
        values: the key-value pairs of the file.

    Raises:
        Unreadable: lists that do not fit one another, or a number out of bounds.
    """
    tokens = list_of(values, "tokens", str)
    if not tokens or len(tokens) > _MAX_TOKENS:
        raise Unreadable(f"{len(tokens)} tokens are no vocabulary")
    kinds = list_of(values, "token_type", int) or [NORMAL] * len(tokens)
    if len(kinds) != len(tokens):
        raise Unreadable(f"{len(kinds)} kinds of tokens, and {len(tokens)} tokens")
    numbers: dict[str, int] = {}
    for number, token in enumerate(tokens):
        if kinds[number] == UNUSED and _PADDING.fullmatch(token):
            continue
        if token in numbers:
            raise Unreadable(f"the tokens {numbers[token]} and {number} are the same")
        numbers[token] = number
    special = {}
    for role, word in {
        "bos": "bos",
        "eos": "eos",
        "unk": "unknown",
        "pad": "padding",
    }.items():
        key = f"{PREFIX}{word}_token_id"
        default = {"bos": 1, "eos": 2, "unk": 0}.get(role) if _is_sentencepiece(values) else None
        number = values.get(key, default)
        if number is not None:
            special[role] = tokens[whole_number(number, key, most=len(tokens) - 1)]
    return StoredVocabulary(tokens, numbers, kinds, special)


def _is_sentencepiece(values: Mapping[str, Any]) -> bool:
    return bool(values.get(f"{PREFIX}model") == "llama")


def list_of(values: Mapping[str, Any], key: str, kind: type) -> list[Any]:
    """A list of the tokenizer, of one type; empty where it is not there.

    Raises:
        Unreadable: it is another thing.
    """
    listed = values.get(f"{PREFIX}{key}", [])
    if not isinstance(listed, list) or not all(type(item) is kind for item in listed):
        raise Unreadable(f"{PREFIX}{key} is no list of {kind.__name__}")
    return listed


def truth_of(values: Mapping[str, Any], key: str, default: bool) -> bool:
    """A truth value of the tokenizer.

    Raises:
        Unreadable: it is another thing.
    """
    value = values.get(f"{PREFIX}{key}", default)
    if type(value) is not bool:
        raise Unreadable(f"{PREFIX}{key} is no truth value")
    return value
