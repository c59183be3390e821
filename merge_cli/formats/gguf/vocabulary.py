"""The keys of a tokenizer in a GGUF file, from tokenizer.json: the inverse of `tokenizer`.

What the keys would be read as again is compared with the tokenizer itself, on its vocabulary, its
merges, and texts. One that they cannot express is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from merge_cli.formats.gguf.pre_tokenizers import PRE_TOKENIZERS
from merge_cli.formats.gguf.stored_vocabulary import (
    BYTE,
    CONTROL,
    NORMAL,
    PREFIX,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
)
from merge_cli.formats.gguf.tokenizer import TEMPLATE, tokenizer_files
from merge_cli.system.untrusted import Unreadable, whole_number

_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_MAX_ROWS = 9_999_999
_TEXTS = (
    "The quick brown fox",
    "  two  spaces,\n\n\ta tab\r\n",
    "don't WE'LL I'm you've",
    "1234567 and 3.14 or 12",
    "Straße, café, 日本語 😀 \u00e9 Ω",
    "def f(x):\n        return x[0] != '/usr/bin'  # ...",
)


def vocabulary_keys(
    document: Mapping[str, Any],
    settings: Mapping[str, Any],
    templates: Mapping[str, str],
    rows: int,
) -> dict[str, Any]:
    """The keys of a tokenizer.

    Args:
        document, settings: tokenizer.json and tokenizer_config.json.
        templates: chat templates by name; the usual one is `default`.
        rows: of the embedding; those without a token are filled up.

    Raises:
        Unreadable: it is of a kind, or cuts text in a way, that the keys cannot express.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(json.dumps(document))
    except Exception as error:  # it has no kind of its own
        raise Unreadable(f"the package tokenizers refuses it ({error})") from None
    model = document["model"]
    if model.get("type") != "BPE":
        raise Unreadable("it is no BPE tokenizer")
    numbers = {**model["vocab"], **{t["content"]: t["id"] for t in document["added_tokens"]}}
    tokens = [f"[PAD{number}]" for number in range(whole_number(rows, "rows", most=_MAX_ROWS))]
    kinds = [UNUSED] * rows
    added = {token["content"]: token["special"] for token in document["added_tokens"]}
    for token, number in numbers.items():
        if not 0 <= number < rows:
            raise Unreadable(f"the token {token[:60]!r} has no row of the embedding")
        tokens[number], kinds[number] = token, NORMAL
        if token in added:
            kinds[number] = CONTROL if added[token] else USER_DEFINED
    merges = [m.split(" ") if isinstance(m, str) else list(m) for m in model["merges"]]
    about: dict[str, Any] = {"tokens": tokens, "token_type": kinds}
    if model.get("byte_fallback"):
        about = {"model": "llama", **about, **_sentencepiece(document, numbers, merges, rows)}
        for number, token in enumerate(tokens):
            if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                kinds[number] = BYTE
        if model.get("unk_token") in numbers:
            kinds[numbers[model["unk_token"]]] = UNKNOWN
    else:
        about = {"model": "gpt2", "pre": _pre_tokenizer(document), **about}
        about["merges"] = [" ".join(merge) for merge in merges]
    special = _special(settings, numbers)
    about |= {f"{_ROLES[role]}_token_id": number for role, number in special.items()}
    ids = tokenizer.encode("a").ids
    about["add_bos_token"] = bool(ids) and ids[0] == special.get("bos")
    about["add_eos_token"] = bool(ids) and ids[-1] == special.get("eos")
    values = {f"{PREFIX}{key}": value for key, value in about.items()}
    for name, text in templates.items():
        values[f"{TEMPLATE}.{name}" if name != "default" else TEMPLATE] = text
    _check(values, tokenizer, document)
    return values


def _special(settings: Mapping[str, Any], numbers: Mapping[str, int]) -> dict[str, int]:
    result = {}
    for role in _ROLES:
        token = settings.get(f"{role}_token")
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str) and text in numbers:
            result[role] = numbers[text]
    return result


def _pre_tokenizer(document: Mapping[str, Any]) -> str:
    """The word for how text is cut."""
    steps = _steps(document.get("pre_tokenizer"))
    normalizer = (document.get("normalizer") or {}).get("type", "")
    whole_words = bool(document["model"].get("ignore_merges"))
    for word, kind in PRE_TOKENIZERS.items():
        cuts: list[Any] = [("Digits", True)] if kind.single_digits else []
        cuts += [("Split", kind.pattern)] if kind.pattern else []
        same = steps == [*cuts, ("ByteLevel", not kind.pattern)]
        if same and kind.normalizer == normalizer and kind.whole_words == whole_words:
            return word
    raise Unreadable("no pre-tokenizer that GGUF names cuts text like it")


def _steps(step: Any) -> list[Any]:
    """What a pre-tokenizer does, one after the other."""
    if not isinstance(step, dict):
        return [None]
    if step.get("type") == "Sequence":
        return [inner for part in step["pretokenizers"] for inner in _steps(part)]
    if step.get("type") == "Digits":
        return [("Digits", bool(step.get("individual_digits")))]
    if step.get("type") == "ByteLevel":
        return [("ByteLevel", bool(step.get("use_regex", True)))]
    pattern = step.get("pattern")
    regex = pattern.get("Regex") if isinstance(pattern, dict) else None
    is_cut = step.get("behavior") == "Isolated" and not step.get("invert")
    return [("Split", regex)] if step.get("type") == "Split" and regex and is_cut else [None]


def _sentencepiece(
    document: Mapping[str, Any], numbers: Mapping[str, int], merges: list[list[str]], rows: int
) -> dict[str, Any]:
    """Scores that make the same merges: the earlier a token is made, the higher."""
    scores = [-float(len(merges) + 1)] * rows
    for rank, (left, right) in reversed(list(enumerate(merges))):
        number = numbers.get(left + right)
        if number is not None:
            scores[number] = -float(rank)
    normalizer = json.dumps(document.get("normalizer"))
    return {"scores": scores, "add_space_prefix": '"Prepend"' in normalizer}


def _check(values: Mapping[str, Any], tokenizer: Any, document: Mapping[str, Any]) -> None:
    """Whether what is read again is the same tokenizer."""
    from tokenizers import Tokenizer

    files, reason = tokenizer_files(values)
    if reason:
        raise Unreadable(reason)
    again = Tokenizer.from_str(files["tokenizer.json"])
    if again.get_vocab() != tokenizer.get_vocab():
        raise Unreadable("its tokens are not those that GGUF would keep")
    texts = [*_TEXTS, *(f"x{token['content']}y" for token in document["added_tokens"][:100])]
    for text in texts:
        for special in (False, True):
            first, second = (
                t.encode(text, add_special_tokens=special).ids for t in (tokenizer, again)
            )
            if first != second:
                raise Unreadable(f"GGUF would cut the text {text[:40]!r} otherwise")
