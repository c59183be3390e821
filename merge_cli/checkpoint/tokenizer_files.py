"""Tokenizer files of a model's folder: read as data, never executed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from merge_cli.checkpoint.source import Source
from merge_cli.checkpoint.tokenizer_schema import (
    check_document,
    check_settings,
    check_templates,
    check_vocabulary,
)
from merge_cli.errors import CorruptFileError
from merge_cli.guarded import Unreadable, read_bytes, read_mapping, read_text

Content = TypeVar("Content", str, bytes)

_SPECIAL = (
    "bos_token",
    "eos_token",
    "unk_token",
    "pad_token",
    "sep_token",
    "cls_token",
    "mask_token",
)
_OPAQUE = (
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "tiktoken.model",
    "merges.txt",
)


@dataclass(frozen=True)
class Tokenizer:
    """What a model's folder says of its tokenizer.

    Attributes:
        size: tokens, added ones included; None where no file lists them.
        digest: of everything that decides how text is cut; None without a tokenizer.
        template: digest of the chat template(s); None without one.
    """

    vocabulary: Mapping[str, int]
    size: int | None
    special: Mapping[str, str]
    digest: str | None
    template: str | None


def read_tokenizer(source: Source) -> Tokenizer:
    """Read the tokenizer files of a model.

    Raises:
        CorruptFileError: a file that is not what its name says.
    """
    return _read(source)


def read_vocabulary(source: Source) -> dict[str, int]:
    """Token -> number; empty where no file lists them.

    Raises:
        CorruptFileError: a file that is not what its name says.
    """
    whole = tokenizer_json(source)
    return tokens_of(whole) if whole else _loose_vocabulary(source.root, source)


def opaque_files(source: Source) -> list[str]:
    """Tokenizer files that are no lists of tokens."""
    return [name for name in _OPAQUE if (source.root / name).is_file()]


def _read(source: Source) -> Tokenizer:
    root = source.root
    config = settings_json(source)
    whole = tokenizer_json(source)
    vocabulary = read_vocabulary(source)
    rules = {key: value for key, value in whole.items() if key not in ("truncation", "padding")}
    opaque = [] if whole else opaque_files(source)
    state = hashlib.sha256(json.dumps([rules, vocabulary], sort_keys=True).encode())
    for name in opaque:
        state.update(_guarded(source, name, read_bytes))
    tokens = {name: _content(config.get(name)) for name in _SPECIAL}
    return Tokenizer(
        vocabulary=vocabulary,
        size=len(vocabulary) or None,
        special={name: token for name, token in tokens.items() if token is not None},
        digest=state.hexdigest() if whole or vocabulary or opaque else None,
        template=_template(root, config, source),
    )


def tokens_of(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    """Token -> number of a tokenizer.json; unigram models list tokens with their scores."""
    model = tokenizer.get("model") or {}
    listed = model.get("vocab") or {}
    if isinstance(listed, list):
        found = {entry[0]: number for number, entry in enumerate(listed)}
    else:
        found = dict(listed)
    for token in tokenizer.get("added_tokens") or ():
        found[token["content"]] = token["id"]
    return found


def _loose_vocabulary(root: Path, source: Source) -> dict[str, int]:
    """vocab.json or vocab.txt, and added_tokens.json; nothing where that alone is there."""
    found = _numbered(source, "vocab.json")
    if not found and (root / "vocab.txt").exists():
        lines = _guarded(source, "vocab.txt", read_text).splitlines()
        found = {token: number for number, token in enumerate(lines)}
    return found | _numbered(source, "added_tokens.json") if found else found


def _numbered(source: Source, name: str) -> dict[str, int]:
    found = json_file(source.root / name, source)
    _check(source, name, lambda: check_vocabulary(found, "it"))
    return dict(found)


def chat_templates(source: Source) -> dict[str, str]:
    """Every chat template by name, however it is stored; the usual one is `default`."""
    return _templates(source.root, settings_json(source), source)


def _template(root: Path, config: Mapping[str, Any], source: Source) -> str | None:
    """A digest of every chat template."""
    texts = _templates(root, config, source)
    if not texts:
        return None
    return hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()


def _templates(root: Path, config: Mapping[str, Any], source: Source) -> dict[str, str]:
    texts: dict[str, str] = {}
    stored = config.get("chat_template")
    if not stored:
        beside = json_file(root / "chat_template.json", source)
        _check(source, "chat_template.json", lambda: check_templates(beside))
        stored = beside.get("chat_template")
    if isinstance(stored, str):
        texts["default"] = stored
    elif isinstance(stored, list):
        texts |= {entry["name"]: entry["template"] for entry in stored}
    if (root / "chat_template.jinja").exists():  # wins over the config, as in transformers
        texts["default"] = _guarded(source, "chat_template.jinja", read_text)
    folder = "additional_chat_templates"
    for path in sorted((root / folder).glob("*.jinja")):
        texts[path.stem] = _guarded(source, f"{folder}/{path.name}", read_text)
    return texts


def _content(token: Any) -> str | None:
    """A special token is a text, or a mapping that holds it."""
    return token.get("content") if isinstance(token, dict) else token


def tokenizer_json(source: Source) -> dict[str, Any]:
    """tokenizer.json, whose fields are what they should be; empty where there is none.

    Raises:
        CorruptFileError: see `tokenizer_schema`.
    """
    found = json_file(source.root / "tokenizer.json", source)
    _check(source, "tokenizer.json", lambda: check_document(found))
    return found


def settings_json(source: Source) -> dict[str, Any]:
    """tokenizer_config.json, likewise.

    Raises:
        CorruptFileError: see `tokenizer_schema`.
    """
    found = json_file(source.root / "tokenizer_config.json", source)
    _check(source, "tokenizer_config.json", lambda: check_settings(found, _SPECIAL))
    return found


def json_file(path: Path, source: Source) -> dict[str, Any]:
    """A JSON mapping; empty where there is no such file.

    Raises:
        CorruptFileError: it cannot be read, or is no mapping.
    """
    return read_mapping(path, source.label) if path.exists() else {}


def _check(source: Source, name: str, check: Callable[[], None]) -> None:
    try:
        check()
    except Unreadable as error:
        raise CorruptFileError(str(error), model=source.label, file=name) from None


def _guarded(source: Source, name: str, read: Callable[[Path], Content]) -> Content:
    try:
        return read(source.root / name)
    except Unreadable as error:
        raise CorruptFileError(str(error), model=source.label, file=name) from None
