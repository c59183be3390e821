"""Tokenizers and chat templates side by side: read as data, never executed.

Rows of an embedding mean tokens by number. Where two models number different tokens alike, their
average is of different things, however well the shapes fit.
"""

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
_EXAMPLES = 5
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


@dataclass(frozen=True)
class TokenizerDifference:
    """How a model's tokenizer differs from the base's (or the first model's).

    Attributes:
        size, reference_size: tokens; None where unknown.
        missing, added, renumbered: tokens of the reference that it lacks, of its own, and those
            that have another number; `examples` names a few of each, in that order.
        special: for each special token that differs, "theirs -> its own".
        rules: whether anything else that cuts text differs (merges, normalizer, ...).
        template: `same`, `differs`, `added`, `missing` or `none` (neither has one).
    """

    model: str
    size: int | None
    reference_size: int | None
    missing: int
    added: int
    renumbered: int
    examples: tuple[str, ...]
    special: Mapping[str, str]
    rules: bool
    template: str

    @property
    def tokens_differ(self) -> bool:
        """Whether a token number may mean different tokens."""
        return bool(self.missing or self.added or self.renumbered)

    @property
    def differs(self) -> bool:
        """Whether anything does."""
        same_template = self.template in ("same", "none")
        return self.tokens_differ or bool(self.special) or self.rules or not same_template


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


def _read(source: Source) -> Tokenizer:
    root = source.root
    config = _json(root / "tokenizer_config.json", source)
    whole = _json(root / "tokenizer.json", source)
    vocabulary = _vocabulary(whole) if whole else _loose_vocabulary(root, source)
    rules = {key: value for key, value in whole.items() if key not in ("truncation", "padding")}
    opaque = [] if whole else [name for name in _OPAQUE if (root / name).is_file()]
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


def tokenizer_difference(model: str, reference: Tokenizer, own: Tokenizer) -> TokenizerDifference:
    """Compare one model's tokenizer with the reference's."""
    theirs, ours = reference.vocabulary, own.vocabulary
    comparable = bool(theirs and ours)
    missing = sorted((t for t in theirs if t not in ours), key=theirs.__getitem__)
    added = sorted((t for t in ours if t not in theirs), key=ours.__getitem__)
    moved = sorted((t for t, n in theirs.items() if ours.get(t, n) != n), key=theirs.__getitem__)
    if not comparable:
        missing, added, moved = [], [], []
    names = {*reference.special, *own.special}
    special = {
        name: f"{reference.special.get(name, '(none)')} -> {own.special.get(name, '(none)')}"
        for name in sorted(names)
        if reference.special.get(name) != own.special.get(name)
    }
    return TokenizerDifference(
        model, own.size, reference.size, len(missing), len(added), len(moved),
        (*missing[:_EXAMPLES], *added[:_EXAMPLES], *moved[:_EXAMPLES]), special,
        not (missing or added or moved) and reference.digest != own.digest,
        _compared(reference.template, own.template),
    )  # fmt: skip


def _compared(theirs: str | None, own: str | None) -> str:
    if theirs == own:
        return "none" if own is None else "same"
    return "added" if theirs is None else "missing" if own is None else "differs"


def _vocabulary(tokenizer: Mapping[str, Any]) -> dict[str, int]:
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
    """vocab.json or vocab.txt, and added_tokens.json."""
    found: dict[str, int] = dict(_json(root / "vocab.json", source))
    if not found and (root / "vocab.txt").is_file():
        lines = (root / "vocab.txt").read_text(encoding="utf-8").splitlines()
        found = {token: number for number, token in enumerate(lines)}
    return found | _json(root / "added_tokens.json", source)


def _template(root: Path, config: Mapping[str, Any], source: Source) -> str | None:
    """A digest of every chat template, however it is stored."""
    texts: dict[str, str] = {}
    stored = config.get("chat_template") or _json(root / "chat_template.json", source).get(
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
    if not texts:
        return None
    return hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()


def _content(token: Any) -> str | None:
    """A special token is a text, or a mapping that holds it."""
    return token.get("content") if isinstance(token, dict) else token


def _json(path: Path, source: Source) -> dict[str, Any]:
    """A JSON mapping; empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        what = f"is not valid JSON: {error}"
        raise CorruptFileError(what, model=source.label, file=path.name) from None
    return found if isinstance(found, dict) else {}
