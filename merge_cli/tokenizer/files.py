"""Reading the tokenizer files of a model's folder, as data: nothing in them is executed.

Every field that is used is checked for its type and bounds; everything else is copied, or left to
the library that reads it. Token numbers become rows of an embedding, so they have a bound:

    0 <= number < rows + tokens      no two tokens of one number

A tokenizer may have tokens without a row in the embedding: numbered one after another, they stay
within that bound.

Older models have only a sentencepiece or tiktoken file. transformers turns it into a
tokenizer.json, because the tokenizer's class decides how its pieces are numbered.

The small JSON files that a merge copies are read, too: an output with a broken one would not load.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from merge_cli.checkpoint.auxiliary_files import companion_files, is_tokenizer_file
from merge_cli.errors import CorruptFileError, SourceError
from merge_cli.sources.source import Source
from merge_cli.system.untrusted import (
    Unreadable,
    kind_of,
    read_bytes,
    read_json,
    read_mapping,
    read_text,
    whole_number,
)

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
# The largest vocabularies have 300,000 tokens; a list of this size still fits into memory.
MAX_TOKENS = 10_000_000
# Larger files are vocabularies: they take a second to read, and are read where they are used.
_SMALL = 2**20
_LISTS = ("modules.json",)


@dataclass(frozen=True)
class Tokenizer:
    """A model's tokenizer, as its files describe it.

    Attributes:
        size: number of tokens, with added ones; None where no file lists them.
        fingerprint: of everything that decides how text is split; None without a tokenizer.
        template: fingerprint of the chat template(s); None without one.
    """

    vocabulary: Mapping[str, int]
    size: int | None
    special: Mapping[str, str]
    fingerprint: str | None
    template: str | None


def read_tokenizer(source: Source) -> Tokenizer:
    """Read the tokenizer files of a model.

    Raises:
        CorruptFileError: a file that is not what its name says.
    """
    root = source.root
    config = settings_json(source)
    document = tokenizer_json(source)
    vocabulary = read_vocabulary(source)
    rules = {key: value for key, value in document.items() if key not in ("truncation", "padding")}
    opaque = [] if document else opaque_files(source)
    state = hashlib.sha256(json.dumps([rules, vocabulary], sort_keys=True).encode())
    for name in opaque:
        state.update(_guarded(source, name, read_bytes))
    tokens = {name: _content(config.get(name)) for name in _SPECIAL}
    return Tokenizer(
        vocabulary=vocabulary,
        size=len(vocabulary) or None,
        special={name: token for name, token in tokens.items() if token is not None},
        fingerprint=state.hexdigest() if document or vocabulary or opaque else None,
        template=_template(root, config, source),
    )


def read_vocabulary(source: Source) -> dict[str, int]:
    """Token -> number; empty where no file lists them.

    Raises:
        CorruptFileError: a file that is not what its name says.
    """
    document = tokenizer_json(source)
    return tokens_of(document) if document else _vocabulary_files(source.root, source)


def opaque_files(source: Source) -> list[str]:
    """Tokenizer files that do not list tokens."""
    return [name for name in _OPAQUE if (source.root / name).is_file()]


def tokens_of(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    """Token -> number of a tokenizer.json; unigram models list tokens with their scores."""
    model = tokenizer.get("model") or {}
    listed = model.get("vocab") or {}
    if isinstance(listed, list):
        tokens = {entry[0]: number for number, entry in enumerate(listed)}
    else:
        tokens = dict(listed)
    for token in tokenizer.get("added_tokens") or ():
        tokens[token["content"]] = token["id"]
    return tokens


def _vocabulary_files(root: Path, source: Source) -> dict[str, int]:
    """vocab.json or vocab.txt, with added_tokens.json; empty if only the latter exists."""
    tokens = _vocabulary_file(source, "vocab.json")
    if not tokens and (root / "vocab.txt").exists():
        lines = _guarded(source, "vocab.txt", read_text).splitlines()
        tokens = {token: number for number, token in enumerate(lines)}
    return tokens | _vocabulary_file(source, "added_tokens.json") if tokens else tokens


def _vocabulary_file(source: Source, name: str) -> dict[str, int]:
    tokens = json_file(source.root / name, source)
    _check(source, name, lambda: check_vocabulary(tokens, "it"))
    return dict(tokens)


def chat_templates(source: Source) -> dict[str, str]:
    """Every chat template by name, however it is stored; the usual one is `default`."""
    return _templates(source.root, settings_json(source), source)


def _template(root: Path, config: Mapping[str, Any], source: Source) -> str | None:
    """A fingerprint of all chat templates."""
    texts = _templates(root, config, source)
    if not texts:
        return None
    return hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()


def _templates(root: Path, config: Mapping[str, Any], source: Source) -> dict[str, str]:
    texts: dict[str, str] = {}
    stored = config.get("chat_template")
    if not stored:
        template_file = json_file(root / "chat_template.json", source)
        _check(source, "chat_template.json", lambda: check_templates(template_file))
        stored = template_file.get("chat_template")
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
    """The text of a special token, which may be stored in a mapping."""
    return token.get("content") if isinstance(token, dict) else token


def tokenizer_json(source: Source) -> dict[str, Any]:
    """tokenizer.json, checked; empty where there is none.

    Raises:
        CorruptFileError: see `check_document`.
    """
    document = json_file(source.root / "tokenizer.json", source)
    _check(source, "tokenizer.json", lambda: check_document(document))
    return document


def settings_json(source: Source) -> dict[str, Any]:
    """tokenizer_config.json, checked; empty where there is none.

    Raises:
        CorruptFileError: see `check_settings`.
    """
    settings = json_file(source.root / "tokenizer_config.json", source)
    _check(source, "tokenizer_config.json", lambda: check_settings(settings, _SPECIAL))
    return settings


def json_file(path: Path, source: Source) -> dict[str, Any]:
    """A JSON mapping; empty where there is no such file.

    Raises:
        CorruptFileError: it cannot be read, or is not a mapping.
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


def check_numbers(source: Source, tokens: Mapping[Any, Any], rows: int) -> None:
    """Check a tokenizer's numbers against the rows of the model's embedding.

    Args:
        rows: of the embedding.

    Raises:
        CorruptFileError: a number out of bounds, or two tokens of one number.
    """
    most = rows + len(tokens) - 1
    seen: dict[int, Any] = {}
    for token, number in tokens.items():
        if not isinstance(token, str) or type(number) is not int or not 0 <= number <= most:
            _refuse(source, token, number, most)
        if seen.setdefault(number, token) is not token:
            message = f"its tokenizer gives {_shown(seen[number])} and {_shown(token)} one number"
            hint = "Rows cannot be told apart by token. Correct the tokenizer's files."
            raise CorruptFileError(f"{message}, {number}", model=source.label, hint=hint)


def _refuse(source: Source, token: Any, number: Any, most: int) -> None:
    try:
        whole_number(number, f"the number of {_shown(token)}", most=most)
        message = f"a token must be text (got {_shown(token)})"
    except Unreadable as error:
        message = str(error)
    hint = "Its embedding has no such row. Correct the tokenizer's files."
    raise CorruptFileError(f"in its tokenizer, {message}", model=source.label, hint=hint) from None


def _shown(token: Any) -> str:
    return repr(str(token)[:40])


def check_document(document: Mapping[str, Any]) -> None:
    """Check a tokenizer.json.

    Raises:
        Unreadable: a field of the wrong type, or a token number out of bounds.
    """
    model = _field(document, "model", dict, "a mapping") or {}
    _field(model, "type", str, "text", "model.")
    listed = model.get("vocab")
    if isinstance(listed, list):  # unigram models list tokens with their scores
        if len(listed) > MAX_TOKENS:
            raise Unreadable(f"model.vocab lists {len(listed)} tokens (at most {MAX_TOKENS})")
        for number, entry in enumerate(listed):
            _check_scored(entry, f"model.vocab[{number}]")
    elif listed is not None:
        check_vocabulary(listed, "model.vocab")
    for number, token in enumerate(_field(document, "added_tokens", list, "a list") or ()):
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
    for token, number in vocabulary.items():
        if type(number) is not int or not 0 <= number < MAX_TOKENS:  # fast: this is a long loop
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


def tokenizer_document(source: Source) -> dict[str, Any]:
    """A model's tokenizer.json, or the one that transformers makes; the caller may change it.

    Raises:
        CorruptFileError: tokenizer.json has invalid fields.
        SourceError: there is no tokenizer.json, and transformers cannot make one.
    """
    if (source.root / "tokenizer.json").exists():
        return tokenizer_json(source)
    try:
        document = json.loads(_converted(source.root))
    except Exception as error:
        # A missing package, or anything that a tokenizer's class raises.
        message = f"its tokenizer cannot be read without a tokenizer.json ({error})"
        hint = "pip install 'merge-cli[sentencepiece]', or save its tokenizer with transformers."
        raise SourceError(message, model=source.label, hint=hint) from error
    assert isinstance(document, dict)
    return document


def converted_vocabulary(source: Source) -> dict[str, int]:
    """Token -> number of a model without a file that lists them.

    Raises:
        SourceError: see `tokenizer_document`.
    """
    return tokens_of(tokenizer_document(source))


@lru_cache(maxsize=16)
def _converted(root: Path) -> str:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(root), trust_remote_code=False)
    return str(tokenizer.backend_tokenizer.to_str())


def check_companions(config_source: Source, tokenizer_source: Source) -> None:
    """Check the small JSON files that a merge copies.

    Raises:
        CorruptFileError: a file that is not JSON, or not a mapping.
    """
    settings_json(tokenizer_source)
    for source, tokenizer in ((config_source, False), (tokenizer_source, True)):
        if not source.root.is_dir():
            continue  # the output of a later stage, or a base of zeros: nothing is copied
        for path in companion_files(source.root):
            is_checked = is_tokenizer_file(path.name) is tokenizer and path.suffix == ".json"
            if not is_checked or path.stat().st_size > _SMALL:
                continue
            json = read_json(path, source.label)
            if not isinstance(json, dict) and path.name not in _LISTS:
                message = f"is not a mapping but {kind_of(json)}"
                raise CorruptFileError(message, model=source.label, file=path.name)
