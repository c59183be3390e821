"""Tokenizer files of a model's folder: read as data, never executed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_cli.checkpoint.source import Source
from merge_cli.errors import CorruptFileError

_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token",
            "mask_token")  # fmt: skip
_OPAQUE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json",
           "tiktoken.model", "merges.txt")  # fmt: skip


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
    try:
        return _read(source)
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        # A file of somebody else's making: whatever is not as expected in it is told alike.
        what = f"its tokenizer files cannot be read ({type(error).__name__}: {error})"
        raise CorruptFileError(what, model=source.label) from error


def read_vocabulary(source: Source) -> dict[str, int]:
    """Token -> number; empty where no file lists them.

    Raises:
        CorruptFileError: a file that is not what its name says.
    """
    try:
        whole = json_file(source.root / "tokenizer.json", source)
        return tokens_of(whole) if whole else _loose_vocabulary(source.root, source)
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        what = f"its tokenizer files cannot be read ({type(error).__name__}: {error})"
        raise CorruptFileError(what, model=source.label) from error


def opaque_files(source: Source) -> list[str]:
    """Tokenizer files that are no lists of tokens."""
    return [name for name in _OPAQUE if (source.root / name).is_file()]


def _read(source: Source) -> Tokenizer:
    root = source.root
    config = json_file(root / "tokenizer_config.json", source)
    whole = json_file(root / "tokenizer.json", source)
    vocabulary = read_vocabulary(source)
    rules = {key: value for key, value in whole.items() if key not in ("truncation", "padding")}
    opaque = [] if whole else opaque_files(source)
    state = hashlib.sha256(json.dumps([rules, vocabulary], sort_keys=True).encode())
    for name in opaque:
        state.update((root / name).read_bytes())
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
        found = {str(entry[0]): number for number, entry in enumerate(listed)}
    else:
        found = dict(listed)
    for token in tokenizer.get("added_tokens") or ():
        found[token["content"]] = token["id"]
    return found


def _loose_vocabulary(root: Path, source: Source) -> dict[str, int]:
    """vocab.json or vocab.txt, and added_tokens.json; nothing where that alone is there."""
    found: dict[str, int] = dict(json_file(root / "vocab.json", source))
    if not found and (root / "vocab.txt").is_file():
        lines = (root / "vocab.txt").read_text(encoding="utf-8").splitlines()
        found = {token: number for number, token in enumerate(lines)}
    return found | json_file(root / "added_tokens.json", source) if found else found


def chat_templates(source: Source) -> dict[str, str]:
    """Every chat template by name, however it is stored; the usual one is `default`."""
    return _templates(source.root, json_file(source.root / "tokenizer_config.json", source), source)


def _template(root: Path, config: Mapping[str, Any], source: Source) -> str | None:
    """A digest of every chat template."""
    texts = _templates(root, config, source)
    if not texts:
        return None
    return hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()


def _templates(root: Path, config: Mapping[str, Any], source: Source) -> dict[str, str]:
    texts: dict[str, str] = {}
    stored = config.get("chat_template") or json_file(root / "chat_template.json", source).get(
        "chat_template"
    )
    if isinstance(stored, str):
        texts["default"] = stored
    elif isinstance(stored, list):
        texts |= {str(entry.get("name")): str(entry.get("template")) for entry in stored}
    if (root / "chat_template.jinja").is_file():  # wins over the config, as in transformers
        texts["default"] = (root / "chat_template.jinja").read_text(encoding="utf-8")
    for path in sorted((root / "additional_chat_templates").glob("*.jinja")):
        texts[path.stem] = path.read_text(encoding="utf-8")
    return texts


def _content(token: Any) -> str | None:
    """A special token is a text, or a mapping that holds it."""
    return token.get("content") if isinstance(token, dict) else token


def json_file(path: Path, source: Source) -> dict[str, Any]:
    """A JSON mapping; empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        what = f"is not valid JSON: {error}"
        raise CorruptFileError(what, model=source.label, file=path.name) from None
    return found if isinstance(found, dict) else {}
