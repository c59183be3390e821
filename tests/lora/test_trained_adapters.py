"""Adapters as they were trained: the live PEFT model's outputs are what the merged model makes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from merge_cli.errors import MergeCliError, MismatchError
from merge_cli.planning.planner import load_recipe, make_plan
from tests.support.adapters import assert_same, llama, merge, passthrough, peft, stirred, train
from tests.support.tiny import read_model

pytestmark = pytest.mark.filterwarnings("ignore")


def tied() -> Any:
    return llama(tie_word_embeddings=True)


ENDS: dict[str, tuple[dict[str, Any], bool]] = {
    "the embedding whole": ({"modules_to_save": ["embed_tokens"]}, False),
    "the head whole": ({"modules_to_save": ["lm_head"]}, False),
    "both whole": ({"modules_to_save": ["embed_tokens", "lm_head"]}, False),
    "the embedding's factors": ({"target_modules": ["q_proj", "embed_tokens"]}, False),
    "the head's factors": ({"target_modules": ["q_proj", "lm_head"]}, False),
    "both's factors": ({"target_modules": ["q_proj", "lm_head", "embed_tokens"]}, False),
    "one whole, one by factors": (
        {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["embed_tokens"]}, False),
    "tied, whole": ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
    "tied, by factors": (
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}, True),
    "neither": ({}, True),
}  # fmt: skip


@pytest.mark.parametrize("case", ENDS)
def test_a_tied_base(tmp_path: Path, case: str) -> None:
    about, ties = ENDS[case]
    model = train(tmp_path, tied, **{"target_modules": ["q_proj"], **about})
    assert_same(tmp_path, model)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is ties
    notes = make_plan(load_recipe(passthrough(tmp_path))).notes
    assert ties or any("tie_word_embeddings: true -> false" in note for note in notes)


def test_a_tied_base_beside_an_adapter_that_unties(tmp_path: Path) -> None:
    """The base's embedding stands in for its head; the adapter's output has both."""
    train(tmp_path, tied, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    recipe = tmp_path / "soup.yaml"
    recipe.write_text(
        "merge_method: linear\nmodels:\n- {model: base, parameters: {weight: 1}}\n"
        "- {model: base+adapter1, parameters: {weight: 1}}\n"
    )
    found = merge(recipe, tmp_path / "out")
    base = read_model(tmp_path / "base")["model.embed_tokens.weight"]
    torch.testing.assert_close(found["lm_head.weight"], base)
    assert not torch.allclose(found["model.embed_tokens.weight"], base)
    assert not json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"]


@pytest.mark.parametrize("ties", [True, False])
def test_resized_and_saved_with_both_ends(tmp_path: Path, ties: bool) -> None:
    llama(tie_word_embeddings=ties).save_pretrained(tmp_path / "base")
    base = hf.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(51)
    model = stirred(peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"])))
    model.save_pretrained(tmp_path / "adapter1", save_embedding_layers=True)
    assert_same(tmp_path, model)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 51


def rows(folder: Path, count: int, end: str = "model.embed_tokens") -> None:
    """An adapter whose embedding alone has so many rows."""
    train(folder, llama, target_modules=["q_proj"], modules_to_save=[end.rpartition(".")[2]])
    file = folder / "adapter1" / "adapter_model.safetensors"
    name = f"base_model.model.{end}.weight"
    save_file({**load_file(file), name: torch.ones(count, 16)}, file)


def test_fewer_rows_cut_the_other_end(tmp_path: Path) -> None:
    rows(tmp_path, 40)
    found = merge(passthrough(tmp_path), tmp_path / "out")
    head = read_model(tmp_path / "base")["lm_head.weight"]
    torch.testing.assert_close(found["lm_head.weight"], head[:40])
    assert hf.LlamaForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == 40


@pytest.mark.parametrize("end", ["model.embed_tokens", "lm_head"])
def test_more_rows_at_one_end_are_refused(tmp_path: Path, end: str) -> None:
    rows(tmp_path, 56, end)
    with pytest.raises(
        MismatchError, match="was resized, and the adapter holds only one"
    ) as caught:
        make_plan(load_recipe(passthrough(tmp_path)))
    assert "save_embedding_layers=True" in str(caught.value)


def classifier(folder: Path, make: Any, kind: Any, **about: Any) -> Any:
    make().save_pretrained(folder / "base")
    base = kind.from_pretrained(folder / "base", **about)
    task = "TOKEN_CLS" if "Token" in kind.__name__ else "SEQ_CLS"
    model = stirred(peft.get_peft_model(
        base, peft.LoraConfig(r=2, task_type=task, target_modules=["q_proj"])))  # fmt: skip
    model.save_pretrained(folder / "adapter1")
    return model


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("ties", [True, False])
def test_a_reward_model_on_its_language_model(tmp_path: Path, count: int, ties: bool) -> None:
    kind = hf.LlamaForSequenceClassification
    model = classifier(tmp_path, lambda: llama(tie_word_embeddings=ties, pad_token_id=0), kind,
                       num_labels=count)  # fmt: skip
    assert_same(tmp_path, model, kind)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]


def test_a_classifier_of_tokens(tmp_path: Path) -> None:
    kind = hf.LlamaForTokenClassification
    model = classifier(tmp_path, lambda: llama(pad_token_id=0), kind, num_labels=5)
    assert_same(tmp_path, model, kind)


def test_a_classifier_s_own_base_has_its_head_replaced(tmp_path: Path) -> None:
    kind = hf.LlamaForSequenceClassification
    kind(llama(pad_token_id=0).config).save_pretrained(tmp_path / "base")
    base = kind.from_pretrained(tmp_path / "base")
    model = stirred(peft.get_peft_model(
        base, peft.LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["q_proj"])))  # fmt: skip
    model.save_pretrained(tmp_path / "adapter1")
    assert_same(tmp_path, model, kind)


def test_a_head_that_no_class_has_is_refused(tmp_path: Path) -> None:
    train(tmp_path, llama, target_modules=["q_proj"])
    file = tmp_path / "adapter1" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.v_head.summary.weight"
    save_file({**tensors, name: torch.zeros(1, 16)}, file)
    with pytest.raises(MismatchError, match=r"v_head.summary.weight: .* brings a head") as caught:
        make_plan(load_recipe(passthrough(tmp_path)))
    assert "merge_and_unload" in str(caught.value)


def test_another_base_than_the_adapter_names_is_said(tmp_path: Path) -> None:
    train(tmp_path, llama, target_modules=["q_proj"])

    def notes() -> list[str]:
        plan = make_plan(load_recipe(passthrough(tmp_path)))
        return [note for note in plan.notes if "says that it is of" in note]

    assert not notes()
    config = tmp_path / "adapter1" / "adapter_config.json"
    about = json.loads(config.read_text())
    for same in ("org/base", "/elsewhere/base/", None, "org/BASE",
                 "/cache/models--org--base/snapshots/abc", "unsloth/base-bnb-4bit"):  # fmt: skip
        config.write_text(json.dumps({**about, "base_model_name_or_path": same}))
        assert not notes(), same
    config.write_text(json.dumps({**about, "base_model_name_or_path": "org/base-instruct"}))
    assert notes() == [
        "base+adapter1: the adapter says that it is of 'org/base-instruct'; "
        "it is put on 'base' here"
    ]


def gemma3() -> Any:
    torch.manual_seed(0)
    text = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
              "num_attention_heads": 2, "image_size": 16, "patch_size": 8}  # fmt: skip
    return hf.Gemma3ForConditionalGeneration(hf.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=45,
        boi_token_index=46, eoi_token_index=47))  # fmt: skip


MODULES = {
    "text": r".*language_model.*\.(q_proj|down_proj)",
    "images": r".*vision.*\.(q_proj|fc1)",
    "both": r".*\.(q_proj|fc1|down_proj)",
}


@pytest.mark.parametrize("tower", MODULES)
def test_a_vision_language_model(tmp_path: Path, tower: str) -> None:
    model = train(tmp_path, gemma3, target_modules=MODULES[tower])
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "wanted")
    wanted, base = read_model(tmp_path / "wanted"), read_model(tmp_path / "base")
    found = merge(passthrough(tmp_path), tmp_path / "out")
    changed = 0
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-5, atol=1e-6)
        changed += not torch.equal(tensor, base[name])
    assert changed == {"text": 4, "images": 5, "both": 9}[tower]


def test_a_tower_is_not_taken_for_the_other(tmp_path: Path) -> None:
    """The text's layers lack what the adapter changes; the tower for images has it."""
    train(tmp_path, gemma3, target_modules=MODULES["text"])
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    gone = [n for n in tensors if "language_model" in n and "q_proj" in n]
    assert gone
    save_file({n: t for n, t in tensors.items() if n not in gone}, file, {"format": "pt"})
    with pytest.raises(MergeCliError, match="the model lacks it"):
        make_plan(load_recipe(passthrough(tmp_path)))


def test_a_language_model_s_adapter_on_the_model_that_sees(tmp_path: Path) -> None:
    train(tmp_path, gemma3, target_modules=MODULES["text"])
    file = tmp_path / "adapter1" / "adapter_model.safetensors"
    tensors = load_file(file)
    first = merge(passthrough(tmp_path), tmp_path / "first")
    for number, name in enumerate(("model.layers", "language_model.model.layers")):
        save_file({n.replace("model.language_model.layers", name): t
                   for n, t in tensors.items()}, file)  # fmt: skip
        found = merge(passthrough(tmp_path), tmp_path / f"out{number}")
        assert all(torch.equal(found[n], first[n]) for n in first)
    save_file({n.replace("model.language_model.layers", "tower.layers"): t
               for n, t in tensors.items() if "q_proj" in n}, file)  # fmt: skip
    with pytest.raises(MismatchError, match="fits in more than one way"):
        make_plan(load_recipe(passthrough(tmp_path)))


def test_reward_models_and_their_language_model(tmp_path: Path) -> None:
    """Refused with the way out, which works."""
    kind = hf.LlamaForSequenceClassification
    llama(pad_token_id=0).save_pretrained(tmp_path / "base")
    for number in (1, 2):
        torch.manual_seed(number)
        kind.from_pretrained(tmp_path / "base", num_labels=1).save_pretrained(
            tmp_path / f"reward{number}"
        )
    recipe = tmp_path / "soup.yaml"
    recipe.write_text(
        "merge_method: task_arithmetic\nbase_model: base\nmodels:\n"
        "- {model: reward1, parameters: {weight: 1}}\n- {model: reward2, parameters: {weight: 1}}\n"
    )
    with pytest.raises(MismatchError, match="classifies with it; base is a language model") as one:
        make_plan(load_recipe(recipe))
    assert "without `base_model`" in str(one.value)
    recipe.write_text(
        "merge_method: linear\nmodels:\n"
        "- {model: reward1, parameters: {weight: 1}}\n- {model: reward2, parameters: {weight: 1}}\n"
    )
    found = merge(recipe, tmp_path / "out")
    assert found["score.weight"].shape == (1, 16)
    kind.from_pretrained(tmp_path / "out")
