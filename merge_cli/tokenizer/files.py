"""Reading the tokenizer files of a model's folder, as data: nothing in them is executed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from merge_cli.errors import CorruptFileError
from merge_cli.sources.source import Source
from merge_cli.system.untrusted import (
    Unreadable,
    read_bytes,
    read_mapping,
    read_text,
    whole_number,
)
from merge_cli.tokenizer.checks import (
    check_document,
    check_settings,
    check_templates,
    check_vocabulary,
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
# Larger files are vocabularies: they take a second to read, and are read where they are used.
_SMALL = 2**20
_LISTS = ("modules.json",)
TEMPLATES = "additional_chat_templates"  # the folder of chat templates besides the default one


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


def template_files(source: Source) -> list[Path]:
    """The files that may hold chat templates, as far as they are there."""
    names = ("tokenizer_config.json", "chat_template.json", "chat_template.jinja")
    files = [source.root / name for name in names if (source.root / name).is_file()]
    return [*files, *sorted((source.root / TEMPLATES).glob("*.jinja"))]


def _templates(root: Path, config: Mapping[str, Any], source: Source) -> dict[str, str]:
    files: dict[str, str] = {}
    if (root / "chat_template.jinja").exists():
        files["default"] = _guarded(source, "chat_template.jinja", read_text)
    for path in sorted((root / TEMPLATES).glob("*.jinja")):
        files[path.stem] = _guarded(source, f"{TEMPLATES}/{path.name}", read_text)
    if files:  # they win over the config, as in transformers
        return files
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
    return texts


def _content(token: Any) -> str | None:
    """The text of a special token, which may be stored in a mapping."""
    return token.get("content") if isinstance(token, dict) else token


def tokenizer_json(source: Source) -> dict[str, Any]:
    """tokenizer.json, checked, with its list of added tokens; empty where there is no file.

    Raises:
        CorruptFileError: see `check_document`.
    """
    path = source.root / "tokenizer.json"
    if not path.exists():
        return {}
    document = json_file(path, source)
    _check(source, "tokenizer.json", lambda: check_document(document))
    return {**document, "added_tokens": document.get("added_tokens", [])}


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
    numbers = tokens.values()
    typed = {*map(type, tokens)} <= {str} and {*map(type, numbers)} <= {int}
    apart = typed and len({*numbers}) == len(tokens)
    if apart and (not tokens or (min(numbers) >= 0 and max(numbers) <= most)):
        return  # nothing is wrong; what is takes a look at each
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
