"""Tokenizers made of GGUF vocabularies, against transformers' reader and the models' own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers as hf
from tokenizers import Tokenizer

from merge_cli.errors import MergeCliError
from merge_cli.formats.gguf.pre_tokenizers import PRE_TOKENIZERS
from merge_cli.formats.gguf.tokenizer import tokenizer_files
from merge_cli.recipe.reference import ModelRef
from merge_cli.sources.opening import open_source
from tests.support.gguf_files import Sizes, gguf_bytes, random_tensors, vocabulary

TEXTS = [
    "the cat sat on the mat",
    "  two  spaces,\n\n\tand a tab\r\n",
    "don't WE'LL I'm",
    "1234567 and 3.14",
    "<|turn|>the dog</s>",
    "Straße, café, 日本語 😀",
]


def byte_vocabulary(**changed: Any) -> dict[str, Any]:
    """One that has every byte."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    keys = vocabulary()
    tokens = keys["tokenizer.ggml.tokens"]
    alphabet = sorted(set(bytes_to_unicode().values()) - set(tokens))
    kinds = keys["tokenizer.ggml.token_type"] + [1] * len(alphabet)
    return keys | {
        "tokenizer.ggml.tokens": tokens + alphabet,
        "tokenizer.ggml.token_type": kinds,
        **{f"tokenizer.ggml.{key}": value for key, value in changed.items()},
    }


def sentencepiece_vocabulary(**changed: Any) -> dict[str, Any]:
    """As Llama 2 has it: special tokens, bytes, pieces by score, single letters."""
    pieces = ["▁t", "he", "▁the", "▁a", "at", "▁c", "▁cat", "an", "in", "▁s", "▁sat", "▁the▁"]
    letters = sorted(set("▁abcdefghijklmnopqrstuvwxyz',.123"))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [2, 3, 3] + [6] * 256 + [1] * (len(pieces) + len(letters)) + [4]
    scores = [0.0] * 259 + [-float(i) for i in range(len(pieces))] + [-1e6] * len(letters) + [0.0]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [*tokens, *pieces, *letters, "<|turn|>"],
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        **{f"tokenizer.ggml.{key}": value for key, value in changed.items()},
    }


def made(keys: dict[str, Any]) -> tuple[Tokenizer, dict[str, Any]]:
    files, reason = tokenizer_files(keys)
    assert not reason
    return Tokenizer.from_str(files["tokenizer.json"]), json.loads(files["tokenizer_config.json"])


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2", "tekken", "dbrx"])
def test_byte_level_as_transformers_reads_it(tmp_path: Path, pre: str) -> None:
    pytest.importorskip("gguf")
    keys = byte_vocabulary(pre=pre)
    sizes = Sizes(layers=1)
    content = gguf_bytes({**sizes.keys(), **keys}, random_tensors(sizes.shapes()))
    (tmp_path / "m.gguf").write_bytes(content)
    theirs = hf.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    ours, settings = made(keys)
    for text in TEXTS:
        expected = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text, add_special_tokens=False).ids == expected, text
        assert ours.decode(expected, skip_special_tokens=False) == text
    assert (settings["bos_token"], settings["eos_token"]) == ("<s>", "</s>")
    assert ours.encode("the").ids[0] == 0


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_as_transformers_reads_it(tmp_path: Path, prefix: bool) -> None:
    pytest.importorskip("gguf")
    keys = sentencepiece_vocabulary(add_space_prefix=prefix)
    ours, settings = made(keys)
    if prefix:  # transformers puts a space before the text whatever the file says
        sizes = Sizes(layers=1)
        content = gguf_bytes({**sizes.keys(), **keys}, random_tensors(sizes.shapes()))
        (tmp_path / "m.gguf").write_bytes(content)
        theirs = hf.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
        for text in ("the cat sat", "a cat, the 3 cats", "Ω and 日本", "they ate the cat"):
            expected = theirs(text, add_special_tokens=False)["input_ids"]
            assert ours.encode(text, add_special_tokens=False).ids == expected, text
    # As in Llama 2, a space is put behind special tokens, too.
    for text in ("the cat sat", "Ω", "a<|turn|>" if prefix else "a<|turn|>b"):
        assert ours.decode(ours.encode(text).ids) == text
    tokens = ours.encode("the").tokens
    assert tokens == (["<s>", "▁the"] if prefix else ["<s>", "t", "he"])
    assert settings["unk_token"] == "<unk>"
    assert ours.encode("Ω", add_special_tokens=False).tokens[-2:] == ["<0xCE>", "<0xA9>"]


def test_digits_are_cut_where_the_model_cuts_them() -> None:
    tokens = ["1", "2", "12"]
    for pre, expected in (("smollm", ["1", "2"]), ("gpt-2", ["12"]), ("llama-bpe", ["12"])):
        keys = {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": pre,
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.merges": ["1 2"],
        }
        tokenizer, _ = made(keys)
        assert tokenizer.encode("12").tokens == expected


def test_ends_of_texts_and_rows_without_tokens() -> None:
    keys = byte_vocabulary(add_bos_token=True, add_eos_token=True)
    tokens = [*keys["tokenizer.ggml.tokens"], "[PAD300]"]
    kinds = [*keys["tokenizer.ggml.token_type"], 5]
    tokenizer, _ = made(
        keys | {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}
    )
    assert tokenizer.token_to_id("[PAD300]") is None
    encoded = tokenizer.encode("the", "cat").tokens
    assert (encoded[0], encoded[-1], encoded.count("<s>"), encoded.count("</s>")) == (
        "<s>", "</s>", 2, 2,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"pre": "unheard-of"}, "'unheard-of' is not known"),
        ({"model": "bert"}, "'bert' is not read"),
        ({"tokens": []}, "0 tokens"),
        ({"tokens": [1, 2]}, "no list of str"),
        ({"tokens": ["a", "a"], "token_type": [1, 1]}, "the tokens 0 and 1 are the same"),
        ({"token_type": [1]}, "1 kinds of tokens"),
        ({"eos_token_id": 10**6}, "eos_token_id must be from 0"),
        ({"merges": ["abc"]}, "is not of two tokens"),
        ({"add_bos_token": 1}, "no truth value"),
    ],
)
def test_what_is_not_understood_makes_no_tokenizer(changed: dict[str, Any], reason: str) -> None:
    files, why = tokenizer_files(byte_vocabulary(**changed))
    assert files == {}
    assert reason in why


def test_a_model_without_its_tokenizer_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MERGE_CLI_CACHE", str(tmp_path / "cache"))
    sizes = Sizes(layers=1)
    keys = {**sizes.keys(), **byte_vocabulary(pre="unheard-of")}
    (tmp_path / "m.gguf").write_bytes(gguf_bytes(keys, random_tensors(sizes.shapes())))
    source = open_source(ModelRef(str(tmp_path / "m.gguf")), tmp_path)
    assert any("no tokenizer is made" in note for note in source.notes)
    assert not (source.root / "tokenizer.json").exists()
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(MergeCliError):
        open_source(ModelRef(str(tmp_path / "m.gguf")), tmp_path)


def test_all_templates_are_kept() -> None:
    keys = byte_vocabulary() | {"tokenizer.chat_template.tool_use": "tools"}
    _, settings = made(keys)
    assert [template["name"] for template in settings["chat_template"]] == ["default", "tool_use"]


def test_patterns_compile() -> None:
    for pre in PRE_TOKENIZERS:
        tokenizer, _ = made(byte_vocabulary(pre=pre))
        for text in TEXTS:
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            assert tokenizer.decode(ids, skip_special_tokens=False) == text
