"""Vocabularies: every row is the row of its token, whatever its number was."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
import yaml
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

import merge_cli
from merge_cli.errors import MismatchError, RecipeError, SourceError
from merge_cli.options import MergeOptions
from merge_cli.planning.planner import load_recipe, make_plan
from tests.support.tiny import llama_config, llama_tensors, read_model, write_model
from tests.support.vocabularies import EMBED, HEAD, TEXTS, bpe, pair, write

OPTIONS = MergeOptions(device="cpu", threads=1)


def unigram(words: Sequence[str], size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=size, special_tokens=["<s>", "</s>", "<unk>"],
                                      unk_token="<unk>", show_progress=False)  # fmt: skip
    tokenizer.train_from_iterator(words, trainer)
    return tokenizer


def word_level(words: Sequence[str]) -> Tokenizer:
    listed = dict.fromkeys(["<s>", "</s>", "<unk>", *(w for text in words for w in text.split())])
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(listed)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def merge(folder: Path, recipe: dict[str, Any], name: str = "out") -> dict[str, torch.Tensor]:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return read_model(merge_cli.merge(path, folder / name, options=OPTIONS).path)


def plan(folder: Path, recipe: dict[str, Any]) -> Any:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return make_plan(load_recipe(path))


SOUP: dict[str, Any] = {
    "merge_method": "soup", "base_model": "base", "dtype": "float32",
    "models": [{"model": "base", "parameters": {"weight": 1.0}},
               {"model": "chat", "parameters": {"weight": 3.0}}],
}  # fmt: skip


@pytest.mark.parametrize("tied", [True, False])
def test_union_row_by_row(tmp_path: Path, tied: bool) -> None:
    a, b, one, two = pair(tmp_path, tied=tied)
    found = merge(tmp_path, {**SOUP, "tokenizer_source": "union"})
    made = hf.AutoTokenizer.from_pretrained(tmp_path / "out")
    ours, theirs, vocabulary = a.get_vocab(), b.get_vocab(), made.get_vocab()
    assert set(vocabulary) == set(ours) | set(theirs)
    assert all(vocabulary[token] == number for token, number in ours.items())
    for name in [EMBED] if tied else [EMBED, HEAD]:
        assert found[name].shape[0] == len(vocabulary)
        for token, number in vocabulary.items():
            mine = one[name][ours[token]].float() if token in ours else None
            other = two[name][theirs[token]].float() if token in theirs else None
            left = other if mine is None else mine
            right = mine if other is None else other
            assert left is not None
            assert right is not None
            wanted = (left + 3 * right) / 4
            torch.testing.assert_close(found[name][number], wanted, rtol=1e-6, atol=1e-7)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vocab_size"] == len(vocabulary)
    hf.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    # Text whose letters the base knows is split as before; chat markers are special tokens.
    for text in TEXTS[:2]:
        assert (
            made.encode(text, add_special_tokens=False)
            == a.encode(text, add_special_tokens=False).ids
        )
    ids = made.encode("<|im_start|>the cat<|im_end|>", add_special_tokens=False)
    assert ids[0] == vocabulary["<|im_start|>"]
    assert made.decode(ids, skip_special_tokens=True) == "the cat"
    assert made.decode(list(vocabulary.values()))


def test_a_union_with_a_tokenizer_without_added_tokens(tmp_path: Path) -> None:
    """The package tokenizers reads a file without the list, and refuses null."""
    pair(tmp_path)
    file = tmp_path / "base" / "tokenizer.json"
    document = json.loads(file.read_text())
    del document["added_tokens"]
    file.write_text(json.dumps(document))
    merge(tmp_path, {**SOUP, "tokenizer_source": "union"})
    made = hf.AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    assert set(document["model"]["vocab"]) < set(made)
    file.write_text(json.dumps(document | {"added_tokens": None}))
    with pytest.raises(SourceError, match=r"added_tokens must be a list \(got null\)"):
        merge(tmp_path, {**SOUP, "tokenizer_source": "union"}, "other")


def test_the_vocabulary_of_another_model(tmp_path: Path) -> None:
    a, b, one, two = pair(tmp_path)
    found = merge(tmp_path, {**SOUP, "tokenizer": {"source": "chat"}})
    ours, theirs = a.get_vocab(), b.get_vocab()
    made = hf.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert made.get_vocab() == theirs
    for text in [*TEXTS, "<|im_start|>dogs"]:
        assert (
            made.encode(text, add_special_tokens=False)
            == b.encode(text, add_special_tokens=False).ids
        )
    for token, number in theirs.items():
        other = two[EMBED][number].float()
        mine = one[EMBED][ours[token]].float() if token in ours else other
        torch.testing.assert_close(found[EMBED][number], (mine + 3 * other) / 4, rtol=1e-6,
                                   atol=1e-7)  # fmt: skip
    for file in ("config.json", "generation_config.json"):
        about = json.loads((tmp_path / "out" / file).read_text())
        eos = about["eos_token_id"]
        assert (eos if isinstance(eos, list) else [eos])[0] == theirs["</s>"]
    settings = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert settings == {"eos_token_id": [theirs["</s>"], theirs["<s>"]], "temperature": 0.7}


def test_the_bases_vocabulary_leaves_the_base_as_it_is(tmp_path: Path) -> None:
    _, _, one, _ = pair(tmp_path)
    recipe = {"merge_method": "passthrough", "base_model": "base", "models": [{"model": "base"}]}
    found = merge(tmp_path, {**recipe, "tokenizer_source": "base"})
    assert torch.equal(found[EMBED], one[EMBED])
    # Rows that only move keep their bytes, also through a method that copies.
    recipe["models"] = [{"model": "chat"}]
    moved = merge(tmp_path, {**recipe, "tokenizer_source": "base"}, "moved")
    tokenizers = [Tokenizer.from_file(str(tmp_path / n / "tokenizer.json")).get_vocab()
                  for n in ("base", "chat")]  # fmt: skip
    chat = load_file(tmp_path / "chat" / "model.safetensors")
    assert moved[EMBED].dtype == torch.bfloat16
    for token, number in tokenizers[0].items():
        if token in tokenizers[1]:
            assert torch.equal(moved[EMBED][number], chat[EMBED][tokenizers[1][token]])
        else:
            assert torch.equal(moved[EMBED][number], one[EMBED][number])


def test_padding_is_kept_or_made(tmp_path: Path) -> None:
    a, b = bpe(TEXTS[:2], 60), bpe(TEXTS[:2], 60)
    b.add_special_tokens(["<|new|>"])
    one = write(tmp_path / "base", a, 1, rows=64)
    two = write(tmp_path / "chat", b, 2, rows=70)
    found = merge(tmp_path, {**SOUP, "tokenizer_source": "base"})
    assert found[EMBED].shape[0] == 64
    size = a.get_vocab_size()
    padding = (one[EMBED][size + 1].float() + 3 * two[EMBED][size + 1].float()) / 4
    torch.testing.assert_close(found[EMBED][size + 1], padding, rtol=1e-6, atol=1e-7)
    wide = merge(tmp_path, {**SOUP, "tokenizer": {"source": "union", "pad_to_multiple_of": 32}},
                 "wide")  # fmt: skip
    assert wide[EMBED].shape[0] == 64
    number = hf.AutoTokenizer.from_pretrained(tmp_path / "wide").get_vocab()["<|new|>"]
    assert number == size  # the first row of the padding
    torch.testing.assert_close(wide[EMBED][number], two[EMBED][b.token_to_id("<|new|>")].float())
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["vocab_size"] == 64
    more = merge(tmp_path, {**SOUP, "tokenizer": {"source": "union", "pad_to_multiple_of": 50}},
                 "more")  # fmt: skip
    assert more[EMBED].shape[0] == 100


def test_three_models_without_a_base_take_the_mean(tmp_path: Path) -> None:
    tokenizers = [bpe(TEXTS[:2], 50), bpe(TEXTS[1:], 55), bpe(TEXTS[:2], 50)]
    tokenizers[1].add_special_tokens(["<x>"])
    tokenizers[2].add_special_tokens(["<x>"])
    names = ["a", "b", "c"]
    tensors = [write(tmp_path / n, t, i) for i, (n, t) in enumerate(zip(names, tokenizers,
                                                                        strict=True))]  # fmt: skip
    models = [{"model": name} for name in names]
    found = merge(tmp_path, {"merge_method": "linear", "models": models, "dtype": "float32",
                             "tokenizer_source": "union"})  # fmt: skip
    number = hf.AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()["<x>"]
    rows = [t[EMBED][k.token_to_id("<x>")].float()
            for t, k in list(zip(tensors, tokenizers, strict=True))[1:]]  # fmt: skip
    mean = (rows[0] + rows[1]) / 2
    wanted = (mean + rows[0] + rows[1]) / 3
    torch.testing.assert_close(found[EMBED][number], wanted, rtol=1e-6, atol=1e-7)


def test_rules_for_single_tokens(tmp_path: Path) -> None:
    a, b, one, two = pair(tmp_path)
    tokens = {
        "<|im_start|>": {"source": "chat", "force": True},
        "<|im_end|>": {"source": {"kind": "zero"}},
        "<s>": {"source": {"kind": "model_token", "model": "chat", "token": "<|im_end|>"},
                "force": True},
        "<|brand_new|>": {"source": {"kind": "model_token", "model": "base", "token_id": 5}},
    }  # fmt: skip
    found = merge(tmp_path, {**SOUP, "tokenizer": {"source": "union", "tokens": tokens}})
    vocabulary = hf.AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()

    def row(token: str) -> torch.Tensor:
        return found[EMBED][vocabulary[token]]

    start, end = (two[EMBED][b.token_to_id(t)].float() for t in ("<|im_start|>", "<|im_end|>"))
    torch.testing.assert_close(row("<|im_start|>"), start)
    torch.testing.assert_close(row("<|im_end|>"), end * 0.75)  # zeros in the base
    torch.testing.assert_close(row("<s>"), end)
    torch.testing.assert_close(row("<|brand_new|>"), one[EMBED][5].float())
    text = (tmp_path / "out" / "merge_recipe.yaml").read_text()
    again = merge_cli.merge(tmp_path / "out" / "merge_recipe.yaml", tmp_path / "again",
                            options=OPTIONS)  # fmt: skip
    assert (again.path / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()
    assert (again.path / "tokenizer.json").read_bytes() == (
        tmp_path / "out" / "tokenizer.json"
    ).read_bytes()
    assert "force: true" in text
    for wrong, message in (
        ({"source": "elsewhere"}, "'elsewhere' is not one of the recipe's models"),
        ({"source": {"kind": "model_token", "model": "chat", "token": "<nope>"}},
         "chat has no token '<nope>'"),
        ({"source": {"kind": "model_token", "model": "chat", "token_id": 9999}},
         "chat has no token 9999"),
    ):  # fmt: skip
        section = {"source": "union", "tokens": {"<|im_start|>": wrong}}
        with pytest.raises(RecipeError, match=message) as caught:
            plan(tmp_path, {**SOUP, "tokenizer": section})
        assert caught.value.problems[0].line > 1
    assert a.get_vocab_size()


@pytest.mark.parametrize("kind", [unigram, lambda words, size: word_level(words)])
def test_other_kinds_of_tokenizers(tmp_path: Path, kind: Any) -> None:
    a, b = kind(TEXTS[:2], 40), kind(TEXTS[1:], 45)
    one, two = write(tmp_path / "base", a, 1), write(tmp_path / "chat", b, 2)
    found = merge(tmp_path, {**SOUP, "tokenizer_source": "union"})
    made = hf.AutoTokenizer.from_pretrained(tmp_path / "out")
    vocabulary, ours, theirs = made.get_vocab(), a.get_vocab(), b.get_vocab()
    assert set(vocabulary) == set(ours) | set(theirs)
    for text in TEXTS[:2]:
        assert (
            made.encode(text, add_special_tokens=False)
            == a.encode(text, add_special_tokens=False).ids
        )
    for token, number in vocabulary.items():
        rows = [one[EMBED][ours[token]].float() if token in ours else None,
                two[EMBED][theirs[token]].float() if token in theirs else None]  # fmt: skip
        left = rows[0] if rows[0] is not None else rows[1]
        right = rows[1] if rows[1] is not None else rows[0]
        assert left is not None
        assert right is not None
        torch.testing.assert_close(found[EMBED][number], (left + 3 * right) / 4)


def test_blocks_and_threads_change_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from merge_cli.engine import memory
    from merge_cli.planning import chunks as units

    pair(tmp_path)
    recipe = {**SOUP, "tokenizer_source": "union"}
    whole = merge(tmp_path, recipe)
    monkeypatch.setattr(units, "UNIT_BYTES", 1)
    for module in (units, memory):
        monkeypatch.setattr(module, "BLOCK_MULTIPLE", 12)  # rows are 8 wide
    monkeypatch.setattr(memory, "_HOST_BLOCK", 12)
    small = merge(tmp_path, recipe, "small")
    assert all(torch.equal(whole[name], small[name]) for name in whole)


def test_without_a_section_the_choices_are_offered(tmp_path: Path) -> None:
    pair(tmp_path)
    with pytest.raises(MismatchError) as caught:
        plan(tmp_path, SOUP)
    hint = caught.value.problems[0].hint
    for choice in ("union", "base", "chat"):
        assert f"tokenizer_source: {choice}" in hint


def test_other_tokens_at_the_same_numbers_are_said(tmp_path: Path) -> None:
    a, b = word_level(TEXTS[:1]), word_level([TEXTS[0][::-1]])
    assert a.get_vocab_size() == b.get_vocab_size()
    write(tmp_path / "base", a, 1)
    write(tmp_path / "chat", b, 2)
    notes = plan(tmp_path, SOUP).notes
    assert any("token numbers mean other tokens than in base" in note for note in notes)
    aligned = plan(tmp_path, {**SOUP, "tokenizer_source": "union"})
    assert not any("mean other tokens" in note for note in aligned.notes)


def test_models_without_readable_tokens_are_told(tmp_path: Path) -> None:
    pair(tmp_path)
    (tmp_path / "chat" / "tokenizer.json").unlink()
    assert any(
        "chat: has no tokenizer; taken to have base's" in note
        for note in plan(tmp_path, {**SOUP, "tokenizer_source": "union"}).notes
    )
    (tmp_path / "chat" / "tokenizer.model").write_bytes(b"pieces")
    with pytest.raises(SourceError, match=r"without a tokenizer.json .* pip install"):
        plan(tmp_path, {**SOUP, "tokenizer_source": "union"})


def pieces(folder: Path, kind: str, text: str, tokenizer_class: str) -> hf.PreTrainedTokenizerBase:
    """A sentencepiece model without a tokenizer.json, and a Llama with as many rows."""
    import sentencepiece

    folder.mkdir()
    (folder / "text.txt").write_text(text)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "tokenizer"), vocab_size=300,
        model_type=kind, byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    about = {"tokenizer_class": tokenizer_class, "bos_token": "<s>", "eos_token": "</s>",
             "unk_token": "<unk>"}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    if tokenizer_class == "T5Tokenizer":
        (folder / "tokenizer.model").rename(folder / "spiece.model")
    theirs = hf.AutoTokenizer.from_pretrained(folder)
    rows = len(theirs)
    tensors = llama_tensors(torch.Generator().manual_seed(rows), vocabulary=rows)
    write_model(folder, tensors, llama_config(vocabulary=rows))
    return theirs


@pytest.mark.parametrize(
    ("kind", "tokenizer_class"),
    [("bpe", "LlamaTokenizer"), ("bpe", "GemmaTokenizer"), ("unigram", "T5Tokenizer")],
)
def test_sentencepiece_alone(tmp_path: Path, kind: str, tokenizer_class: str) -> None:
    """Rows of a union are the rows of their tokens as transformers numbers the pieces."""
    texts = (" ".join(TEXTS) * 9, "the cat said: zwei Hunde, drei Katzen, viele Leute " * 9)
    both = [
        pieces(tmp_path / name, kind, text, tokenizer_class)
        for name, text in zip(("base", "chat"), texts, strict=True)
    ]
    marker = {"content": "<|im_start|>", "special": False, "single_word": False, "lstrip": False,
              "rstrip": False, "normalized": False}  # fmt: skip
    about = json.loads((tmp_path / "chat" / "tokenizer_config.json").read_text())
    about["added_tokens_decoder"] = {str(len(both[1])): marker}
    (tmp_path / "chat" / "tokenizer_config.json").write_text(json.dumps(about))
    both[1] = hf.AutoTokenizer.from_pretrained(tmp_path / "chat")  # numbered as it likes
    rows = len(both[1])
    tensors = llama_tensors(torch.Generator().manual_seed(5), vocabulary=rows)
    write_model(tmp_path / "chat", tensors, llama_config(vocabulary=rows))
    recipe = tmp_path / "recipe.yaml"
    models = [{"model": "base", "parameters": {"weight": 0}},
              {"model": "chat", "parameters": {"weight": 1}}]  # fmt: skip
    recipe.write_text(yaml.safe_dump({
        "merge_method": "soup", "base_model": "base", "models": models,
        "tokenizer_source": "union", "dtype": "float32",
    }))  # fmt: skip
    found = read_model(merge_cli.merge(recipe, tmp_path / "out", options=OPTIONS).path)
    union = hf.AutoTokenizer.from_pretrained(tmp_path / "out")
    numbers = union.get_vocab()
    for token, old in both[1].get_vocab().items():
        assert torch.equal(found[EMBED][numbers[token]], tensors[EMBED][old].float()), token
    for token, old in both[0].get_vocab().items():
        assert numbers[token] == old
    for text in TEXTS:
        assert union.encode(text) == both[0].encode(text)
    assert numbers["<|im_start|>"] in union.encode("a<|im_start|>b")


@pytest.mark.parametrize(
    "wanted", ["auto", "chatml", "{{ messages[0]['content'] }}!", "mine.jinja"]
)
def test_chat_templates(tmp_path: Path, wanted: str) -> None:
    tokenizer = bpe(TEXTS, 60)
    for seed, (name, chat) in enumerate((("base", None), ("chat", "A{{ messages }}"),
                                         ("b", "B"), ("c", "B"))):  # fmt: skip
        write(tmp_path / name, tokenizer, seed, chat=chat)
    (tmp_path / "mine.jinja").write_text("mine {{ messages[0]['content'] }}")
    models = [{"model": name} for name in ("chat", "b", "c")]
    recipe = {"merge_method": "linear", "base_model": "base", "models": models,
              "chat_template": wanted}  # fmt: skip
    merge(tmp_path, recipe)
    made = hf.AutoTokenizer.from_pretrained(tmp_path / "out")
    shown = made.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert shown == {
        "auto": "B", "chatml": "<|im_start|>user\nhi<|im_end|>\n", "mine.jinja": "mine hi",
    }.get(wanted, "hi!")  # fmt: skip
    assert "chat_template" not in json.loads(
        (tmp_path / "out" / "tokenizer_config.json").read_text()
    )
    again = merge_cli.merge(tmp_path / "out" / "merge_recipe.yaml", tmp_path / "again",
                            options=OPTIONS).path  # fmt: skip
    assert (again / "chat_template.jinja").read_text() == (
        tmp_path / "out" / "chat_template.jinja"
    ).read_text()


def test_another_template_or_tokenizer_is_other_work(tmp_path: Path) -> None:
    """OUT with another template is not what this recipe makes, though the weights are the same."""
    from merge_cli.engine.journal import work_key

    tokenizer = bpe(TEXTS, 60)
    for seed, name in enumerate(("base", "chat")):
        write(tmp_path / name, tokenizer, seed)
    keys = {
        work_key(plan(tmp_path, {**SOUP, **more}), "cpu", True)
        for more in ({}, {"chat_template": "chatml"}, {"chat_template": "alpaca"},
                     {"tokenizer_source": "chat"})
    }  # fmt: skip
    assert len(keys) == 4
