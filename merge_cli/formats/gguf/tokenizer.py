"""tokenizer.json and its settings, from the vocabulary of a GGUF file.

A file has tokens, their kinds, and merges or scores; how text is cut before that is one word, the
name of a pre-tokenizer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from merge_cli.formats.gguf.pre_tokenizers import PRE_TOKENIZERS
from merge_cli.formats.gguf.stored_vocabulary import (
    BYTE,
    CONTROL,
    PREFIX,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    StoredVocabulary,
    list_of,
    truth_of,
    vocabulary_of,
)
from merge_cli.system.untrusted import Unreadable

TEMPLATE = "tokenizer.chat_template"


def tokenizer_files(values: Mapping[str, Any]) -> tuple[dict[str, str], str]:
    """The tokenizer's files, by name, and why there are none.

    Args:
        values: the key-value pairs of the file.
    """
    try:
        vocabulary = vocabulary_of(values)
        model = values.get(f"{PREFIX}model")
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
    numbers = [values.get(f"{PREFIX}{role}_token_id") for role in ("eos", "eot")]
    return list(dict.fromkeys(number for number in numbers if type(number) is int))


def _byte_level(
    values: Mapping[str, Any], vocabulary: StoredVocabulary
) -> tuple[dict[str, Any], bool]:
    """Byte-level BPE, as GPT-2 has it."""
    word = values.get(f"{PREFIX}pre")
    pre_tokenizer = PRE_TOKENIZERS.get(word) if isinstance(word, str) else None
    if pre_tokenizer is None:
        raise Unreadable(f"the pre-tokenizer {str(word)[:60]!r} is not known")
    merges = []
    for merge in list_of(values, "merges", str):
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
    values: Mapping[str, Any], vocabulary: StoredVocabulary
) -> tuple[dict[str, Any], bool]:
    """BPE of sentencepiece, as Llama 2 has it; unknown characters become their bytes."""
    scores = list_of(values, "scores", float)
    if len(scores) != len(vocabulary.tokens) or any(map(math.isnan, scores)):
        raise Unreadable(f"{len(scores)} scores, and {len(vocabulary.tokens)} tokens")
    prefix = truth_of(values, "add_space_prefix", True)
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


def _merges(vocabulary: StoredVocabulary, scores: Sequence[float]) -> list[list[str]]:
    """The merges that scores stand for: every way to make a token of two, the best token first."""
    apart = (UNKNOWN, CONTROL, UNUSED, BYTE)
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
    vocabulary: StoredVocabulary,
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
        special = vocabulary.kinds[number] in (CONTROL, UNKNOWN) or token in named
        if special or vocabulary.kinds[number] == USER_DEFINED:
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
    values: Mapping[str, Any], vocabulary: StoredVocabulary, adds_bos: bool
) -> dict[str, Any] | None:
    """What is put before and behind each text."""
    ends = []
    for role, default in (("bos", adds_bos), ("eos", False)):
        token = vocabulary.special.get(role)
        ends.append(token if truth_of(values, f"add_{role}_token", default) else None)
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
