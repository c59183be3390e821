"""Files of a model's folder whose fields are not what they should be: always a sentence."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

import merge_cli
from merge_cli.errors import CorruptFileError, HubError, SourceError
from merge_cli.recipe.reference import expanded, hub_id, is_revision
from merge_cli.system.untrusted import Unreadable
from merge_cli.tokenizer.checks import check_document, check_settings, check_vocabulary
from tests.support.tiny import Family

NOT_TEXT: tuple[Any, ...] = (None, True, 3, 1.5, [], {})
MODEL = {"model": {"vocab": {"a": 0}}}
SOUP = "merge_method: soup\nmodels: [./a, ./b]\n"


@pytest.mark.parametrize(
    ("document", "what"),
    [
        ({}, "model must be a mapping (got null)"),
        ({"model": None}, "model must be a mapping (got null)"),
        ({"model": 3}, "model must be a mapping (got the number 3)"),
        ({"model": {"type": []}}, "model.type must be text (got a list)"),
        ({"model": {"vocab": "x"}}, "model.vocab must be a mapping (got the text 'x')"),
        ({"model": {"vocab": {"a": None}}}, "model.vocab: the number of 'a' must be a whole"),
        ({"model": {"vocab": {"a": True}}}, "must be a whole number (got true)"),
        ({"model": {"vocab": {"a": 1.0}}}, "must be a whole number (got the number 1.0)"),
        ({"model": {"vocab": {"a": -5}}}, "must be from 0 to 9999999 (got -5)"),
        ({"model": {"vocab": {"a": 2**63}}}, "must be from 0 to 9999999"),
        ({"model": {"vocab": [["a"]]}}, "model.vocab[0] must be a token and its score"),
        ({"model": {"vocab": [["a", 0.0], ["b", "x"]]}}, "model.vocab[1] must be a token and"),
        ({"model": {"vocab": [[1, 0.0]]}}, "model.vocab[0] must be a token and its score"),
        ({**MODEL, "added_tokens": None}, "added_tokens must be a list (got null)"),
        ({**MODEL, "added_tokens": {}}, "added_tokens must be a list (got a mapping)"),
        ({**MODEL, "added_tokens": [None]}, "added_tokens[0] must be a mapping (got null)"),
        ({**MODEL, "added_tokens": [{"id": 1}]}, "added_tokens[0].content must be text (got null)"),
        (
            {**MODEL, "added_tokens": [{"content": "a"}]},
            "added_tokens[0].id must be a whole number",
        ),
        (
            {**MODEL, "added_tokens": [{"content": "a", "id": 10**9}]},
            "added_tokens[0].id must be from 0",
        ),
    ],
)
def test_tokenizer_json(document: dict[str, Any], what: str) -> None:
    with pytest.raises(Unreadable) as caught:
        check_document(document)
    assert what in str(caught.value)


def test_what_tokenizers_write_is_read() -> None:
    check_document(MODEL)
    check_document({"model": {"type": "Unigram", "vocab": [["a", -1.5], ["b", 0]]}})
    check_document({"model": {"vocab": {"a": 0}}, "added_tokens": [{"content": "b", "id": 1}]})
    check_vocabulary({}, "it")
    check_settings({"bos_token": None, "eos_token": {"content": "x"}, "pad_token": "y"}, SPECIAL)
    check_settings({"chat_template": [{"name": "default", "template": "{{ 1 }}"}]}, SPECIAL)


SPECIAL = ("bos_token", "eos_token", "pad_token")


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"bos_token": 3}, "bos_token must be text, or a mapping with it (got the number 3)"),
        ({"eos_token": {"content": []}}, "eos_token must be text, or a mapping with it"),
        ({"pad_token": False}, "pad_token must be text, or a mapping with it (got false)"),
        ({"chat_template": 1}, "chat_template must be text, or a list (got the number 1)"),
        ({"chat_template": ["x"]}, "chat_template[0] must have 'name', a text"),
        ({"chat_template": [{"name": "a", "template": None}]}, "must have 'template', a text"),
        ({"added_tokens_decoder": []}, "added_tokens_decoder must be a mapping (got a list)"),
        ({"added_tokens_decoder": {"1": "x"}}, "added_tokens_decoder.1 must be a mapping"),
    ],
)
def test_tokenizer_config(settings: dict[str, Any], what: str) -> None:
    with pytest.raises(Unreadable) as caught:
        check_settings(settings, SPECIAL)
    assert what in str(caught.value)


@pytest.mark.parametrize(
    ("file", "content", "what"),
    [
        ("generation_config.json", "[" * 9000, "nests deeper than"),
        ("generation_config.json", '{"eos_token_id": ' + "9" * 400 + "}", "a number of 400 digits"),
        ("generation_config.json", "null", "is not a mapping but null"),
        ("special_tokens_map.json", "[1]", "is not a mapping but a list"),
        ("preprocessor_config.json", "{", "is not valid JSON"),
        ("tokenizer_config.json", '{"bos_token": 3}', "bos_token must be text"),
        ("processor_config.json", '{"a": "\\ud800"}', "half of a surrogate pair"),
        ("config.json", '{"a": ' * 300 + "1" + "}" * 300, "nests deeper than 64 levels"),
        ("config.json", '"x"', "is not a mapping but the text 'x'"),
    ],
)
def test_files_that_are_copied_are_read_by_the_plan(
    family: Family, file: str, content: str, what: str
) -> None:
    (family.folder / "a" / file).write_text(content)
    with pytest.raises(CorruptFileError) as caught:
        merge_cli.plan(family.write(SOUP))
    assert what in str(caught.value)
    assert caught.value.file == file


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
def test_files_that_are_none(family: Family, file: str, kind: str) -> None:
    path = family.folder / "a" / file
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    with pytest.raises(SourceError, match="it is not a regular file"):
        merge_cli.plan(family.write(SOUP))


def test_a_file_of_a_terabyte(family: Family) -> None:
    with (family.folder / "a" / "config.json").open("wb") as file:
        file.truncate(10**12)
    with pytest.raises(CorruptFileError, match="is larger than 256 MiB"):
        merge_cli.plan(family.write(SOUP))


@pytest.mark.parametrize(
    "name",
    ["a b/c", "../x", "-x/y", "x/-y", "x/y.", "a" * 97, "org/" + "n" * 94, "ö/x", "x--y/z",
     "x/y.git", "a/b/c", "x/..", "x\n/y", "", "/", "org/", "x/y@z", "\u202e/x"],
)  # fmt: skip
def test_names_that_the_hub_cannot_have(name: str) -> None:
    assert hub_id(name) is None


def test_names_that_the_hub_has() -> None:
    for name in ("gpt2", "org/Model-7B_v0.1", "hf://org/a.b", "_x/y", "0x/1", "n" * 96, "a/b_"):
        assert hub_id(name) == name.removeprefix("hf://")
    for revision in ("main", "refs/pr/3", "v1.0", "feature/x_y-z", "0" * 40, "a+b"):
        assert is_revision(revision)
    for revision in ("", "-x", "../x", "a b", "a/../b", "/x", "x/", "ö", "x" * 201, "a\nb"):
        assert not is_revision(revision)


@pytest.mark.parametrize(
    ("model", "kind", "what"),
    [
        ("~nosuchuser/model", SourceError, "no such folder"),
        ("./" + "x" * 300, SourceError, "no such folder"),
        ("org/a@..", HubError, "'..' is not the name of a branch, a tag or a commit"),
        ("hf://../x", HubError, "not a name that the Hub has"),
    ],
)
def test_models_that_cannot_be(
    family: Family, model: str, kind: type[SourceError], what: str
) -> None:
    document = {"merge_method": "soup", "models": [model, "./b"]}
    with pytest.raises(kind) as caught:
        merge_cli.plan(family.write(json.dumps(document)))
    assert what in str(caught.value)


def test_a_home_of_nobody() -> None:
    assert expanded("~nosuchuser/x") == Path("~nosuchuser/x")
    assert expanded("~/x") == Path.home() / "x"
