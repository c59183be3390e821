"""tokenizer.json and its settings, from the vocabulary of a GGUF file.

A file has tokens, their kinds, and merges or scores; how text is cut before that is one word, the
name of a pre-tokenizer. The words that are known stand here with what they mean; for another one
no tokenizer is written, rather than one that cuts numbers or words otherwise than the model's.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merge_cli.system.untrusted import Unreadable, whole_number

_PREFIX = "tokenizer.ggml."
TEMPLATE = "tokenizer.chat_template"
_MAX_TOKENS = 9_999_999
# Kinds of tokens, as ggml numbers them.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_PADDING = re.compile(r"\[PAD\d+\]")  # rows of the embedding that have no token

# What text is cut into before merges, as the models' own tokenizer.json have it.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class PreTokenizer:
    """How text is cut.

    Attributes:
        pattern: the expression of the cuts; empty for GPT-2's.
        single_digits: whether numbers are cut into digits before.
        whole_words: whether a word that is a token is taken whole, whatever its merges.
        adds_bos: whether text begins with a token of its own where the file does not say.
        normalizer: the form of Unicode that text is brought to.
    """

    pattern: str = ""
    single_digits: bool = False
    whole_words: bool = False
    adds_bos: bool = False
    normalizer: str = ""


_GPT2 = PreTokenizer()
_DIGITS = PreTokenizer(single_digits=True)
_LLAMA = PreTokenizer(_LLAMA3, whole_words=True, adds_bos=True)
_QWEN = PreTokenizer(_QWEN2, normalizer="NFC")
# The words of files, which llama.cpp's llama-vocab.cpp lists.
PRE_TOKENIZERS = {
    **dict.fromkeys(("gpt-2", "phi-2", "roberta-bpe", "mpt", "olmo", "jais"), _GPT2),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _DIGITS
    ),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3"), _LLAMA),
    **dict.fromkeys(("dbrx", "smaug-bpe"), PreTokenizer(_LLAMA3)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _QWEN),
    "stablelm2": PreTokenizer(_QWEN2),
    "tekken": PreTokenizer(_TEKKEN, whole_words=True, adds_bos=True),
}


@dataclass(frozen=True)
class _Vocabulary:
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


def tokenizer_files(values: Mapping[str, Any]) -> tuple[dict[str, str], str]:
    """The tokenizer's files, by name, and why there are none.

    Args:
        values: the key-value pairs of the file.
    """
    try:
        vocabulary = _vocabulary(values)
        model = values.get(f"{_PREFIX}model")
        if model == "gpt2":
            document, adds_bos = _byte_level(values, vocabulary)
        elif model == "llama":
            document, adds_bos = _sentencepiece(values, vocabulary)
        else:
            raise Unreadable(f"a vocabulary of the kind {str(model)[:60]!r} is not read")
        templates = _templates(values)
        document["post_processor"] = _post_processor(values, vocabulary, adds_bos)
    except Unreadable as error:
        return {}, str(error)
    settings: dict[str, Any] = {
        f"{role}_token": token for role, token in vocabulary.special.items()
    }
    settings |= {
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    length = values.get(f"{values.get('general.architecture')}.context_length")
    if type(length) is int:
        settings["model_max_length"] = length
    if templates:
        settings["chat_template"] = templates
    return {
        "tokenizer.json": json.dumps(document, ensure_ascii=False, indent=1),
        "tokenizer_config.json": json.dumps(settings, ensure_ascii=False, indent=2),
    }, ""


def end_tokens(values: Mapping[str, Any]) -> list[int]:
    """The tokens that end an answer: of the text, and of a turn where that is another one."""
    numbers = [values.get(f"{_PREFIX}{role}_token_id") for role in ("eos", "eot")]
    return list(dict.fromkeys(number for number in numbers if type(number) is int))


def _vocabulary(values: Mapping[str, Any]) -> _Vocabulary:
    tokens = _listed(values, "tokens", str)
    if not tokens or len(tokens) > _MAX_TOKENS:
        raise Unreadable(f"{len(tokens)} tokens are no vocabulary")
    kinds = _listed(values, "token_type", int) or [_NORMAL] * len(tokens)
    if len(kinds) != len(tokens):
        raise Unreadable(f"{len(kinds)} kinds of tokens, and {len(tokens)} tokens")
    numbers: dict[str, int] = {}
    for number, token in enumerate(tokens):
        if kinds[number] == _UNUSED and _PADDING.fullmatch(token):
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
        key = f"{_PREFIX}{word}_token_id"
        default = {"bos": 1, "eos": 2, "unk": 0}.get(role) if _is_sentencepiece(values) else None
        number = values.get(key, default)
        if number is not None:
            special[role] = tokens[whole_number(number, key, most=len(tokens) - 1)]
    return _Vocabulary(tokens, numbers, kinds, special)


def _is_sentencepiece(values: Mapping[str, Any]) -> bool:
    return bool(values.get(f"{_PREFIX}model") == "llama")


def _listed(values: Mapping[str, Any], key: str, kind: type) -> list[Any]:
    listed = values.get(f"{_PREFIX}{key}", [])
    if not isinstance(listed, list) or not all(type(item) is kind for item in listed):
        raise Unreadable(f"{_PREFIX}{key} is no list of {kind.__name__}")
    return listed


def _truth(values: Mapping[str, Any], key: str, default: bool) -> bool:
    value = values.get(f"{_PREFIX}{key}", default)
    if type(value) is not bool:
        raise Unreadable(f"{_PREFIX}{key} is no truth value")
    return value


def _byte_level(values: Mapping[str, Any], vocabulary: _Vocabulary) -> tuple[dict[str, Any], bool]:
    """Byte-level BPE, as GPT-2 has it."""
    word = values.get(f"{_PREFIX}pre")
    pre_tokenizer = PRE_TOKENIZERS.get(word) if isinstance(word, str) else None
    if pre_tokenizer is None:
        raise Unreadable(f"the pre-tokenizer {str(word)[:60]!r} is not known")
    merges = []
    for merge in _listed(values, "merges", str):
        left, _, right = merge.partition(" ")
        if not left or not right or " " in right:
            raise Unreadable(f"the merge {merge[:60]!r} is not of two tokens")
        if left + right in vocabulary.numbers:  # else it leads nowhere
            merges.append([left, right])
    steps: list[dict[str, Any]] = []
    if pre_tokenizer.single_digits:
        steps.append({"type": "Digits", "individual_digits": True})
    if pre_tokenizer.pattern:
        pattern = {"Regex": pre_tokenizer.pattern}
        steps.append({"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False})
    steps.append(_bytes(use_regex=not pre_tokenizer.pattern))
    normalizer = {"type": pre_tokenizer.normalizer} if pre_tokenizer.normalizer else None
    return _document(
        vocabulary,
        merges,
        normalizer=normalizer,
        pre_tokenizer={"type": "Sequence", "pretokenizers": steps},
        decoder=_bytes(use_regex=True),
        ignore_merges=pre_tokenizer.whole_words,
    ), pre_tokenizer.adds_bos


def _bytes(*, use_regex: bool) -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


def _sentencepiece(
    values: Mapping[str, Any], vocabulary: _Vocabulary
) -> tuple[dict[str, Any], bool]:
    """BPE of sentencepiece, as Llama 2 has it; unknown characters become their bytes."""
    scores = _listed(values, "scores", float)
    if len(scores) != len(vocabulary.tokens) or any(map(math.isnan, scores)):
        raise Unreadable(f"{len(scores)} scores, and {len(vocabulary.tokens)} tokens")
    prefix = _truth(values, "add_space_prefix", True)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    back = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    before = [{"type": "Prepend", "prepend": "\u2581"}] if prefix else []
    after = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    decoders = [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *after]
    return _document(
        vocabulary,
        _merges(vocabulary, scores),
        normalizer={"type": "Sequence", "normalizers": [*before, replace]},
        pre_tokenizer=None,
        decoder={"type": "Sequence", "decoders": decoders},
        unk_token=vocabulary.special["unk"],
        fuse_unk=True,
        byte_fallback=True,
    ), True


def _merges(vocabulary: _Vocabulary, scores: Sequence[float]) -> list[list[str]]:
    """The merges that scores stand for: every way to make a token of two, the best token first."""
    apart = (_UNKNOWN, _CONTROL, _UNUSED, _BYTE)
    pieces = {t: n for t, n in vocabulary.numbers.items() if vocabulary.kinds[n] not in apart}
    merges = []
    for token, number in pieces.items():
        splits = ((token[:i], token[i:]) for i in range(1, len(token)))
        pairs = [(left, right) for left, right in splits if left in pieces and right in pieces]
        pairs.sort(key=lambda pair: (pieces[pair[0]], pieces[pair[1]]))
        merges += [(scores[number], len(left), len(right), left, right) for left, right in pairs]
    merges.sort(key=lambda merge: merge[:3], reverse=True)
    return [[left, right] for *_, left, right in merges]


def _document(
    vocabulary: _Vocabulary,
    merges: list[list[str]],
    *,
    normalizer: dict[str, Any] | None,
    pre_tokenizer: dict[str, Any] | None,
    decoder: dict[str, Any],
    unk_token: str | None = None,
    fuse_unk: bool = False,
    byte_fallback: bool = False,
    ignore_merges: bool = False,
) -> dict[str, Any]:
    """tokenizer.json, without the tokens that are added to every text."""
    added = []
    named = set(vocabulary.special.values())
    for token, number in vocabulary.numbers.items():
        special = vocabulary.kinds[number] in (_CONTROL, _UNKNOWN) or token in named
        if special or vocabulary.kinds[number] == _USER_DEFINED:
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            added.append({"id": number, "content": token, **flags, "special": special})
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unk_token,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": fuse_unk,
            "byte_fallback": byte_fallback,
            "ignore_merges": ignore_merges,
            "vocab": dict(vocabulary.numbers),
            "merges": merges,
        },
    }


def _post_processor(
    values: Mapping[str, Any], vocabulary: _Vocabulary, adds_bos: bool
) -> dict[str, Any] | None:
    """What is put before and behind each text."""
    ends = []
    for role, default in (("bos", adds_bos), ("eos", False)):
        token = vocabulary.special.get(role)
        ends.append(token if _truth(values, f"add_{role}_token", default) else None)
    before, after = ends
    if before is None and after is None:
        return None

    def around(sequence: str, number: int) -> list[dict[str, Any]]:
        first = [{"SpecialToken": {"id": before, "type_id": number}}] if before else []
        last = [{"SpecialToken": {"id": after, "type_id": number}}] if after else []
        return [*first, {"Sequence": {"id": sequence, "type_id": number}}, *last]

    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": [*around("A", 0), *around("B", 1)],
        "special_tokens": {
            token: {"id": token, "ids": [vocabulary.numbers[token]], "tokens": [token]}
            for token in dict.fromkeys(filter(None, ends))
        },
    }


def _templates(values: Mapping[str, Any]) -> str | list[dict[str, str]]:
    """The chat template, or all of them with their names; empty without one."""
    named = {
        key.removeprefix(f"{TEMPLATE}.") if key != TEMPLATE else "default": text
        for key, text in values.items()
        if key == TEMPLATE or key.startswith(f"{TEMPLATE}.")
    }
    if not all(isinstance(text, str) for text in named.values()):
        raise Unreadable(f"{TEMPLATE} is no text")
    if set(named) <= {"default"}:
        return str(named.get("default", ""))
    return [{"name": name, "template": text} for name, text in named.items()]
