"""An adapter that is edited: it means what PEFT makes of it, or it is refused by name."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import merge_cli
from merge_cli.errors import MergeCliError, MismatchError, SourceError
from merge_cli.planning.planner import load_recipe, make_plan
from tests.support.adapters import gpt2, llama, merge, mixtral, passthrough, peft, write
from tests.support.tiny import read_model

pytestmark = pytest.mark.filterwarnings("ignore")
Tensors = dict[str, torch.Tensor]
PREFIX = "base_model.model."
CONFIG: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj"]}


def biased() -> Any:
    return llama(attention_bias=True)


def lacking(part: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: t for name, t in tensors.items() if part not in name}


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.replace(old, new): t for name, t in tensors.items()}


def edit(
    folder: Path, config: dict[str, Any], tensors: Callable[[Tensors], Tensors] | None = None
) -> None:
    """Change the adapter's config, where None takes a key out, and its tensors."""
    file = folder / "adapter1" / "adapter_config.json"
    about = {**json.loads(file.read_text()), **config}
    file.write_text(json.dumps({key: value for key, value in about.items() if value != "absent"}))
    if tensors:
        weights = folder / "adapter1" / "adapter_model.safetensors"
        save_file(tensors(load_file(weights)), weights, {"format": "pt"})


def by_peft(folder: Path) -> tuple[Tensors | None, bool]:
    """What PEFT makes of the adapter, if it loads it, and whether it warns of missing keys."""
    base = hf.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            model = peft.PeftModel.from_pretrained(base, folder / "adapter1")
    except (KeyError, RuntimeError, ValueError):  # an entry that it wants, a shape, its config
        return None, False
    return dict(model.merge_and_unload().state_dict()), any(
        "missing adapter keys" in str(warning.message) for warning in said
    )


Edit = tuple[Callable[[], Any], dict[str, Any], dict[str, Any], Any]
# The model, the adapter as it was trained, then what is changed in its config and its tensors.
REFUSED: dict[str, tuple[Edit, str]] = {
    "a shorter list": (
        (llama, {}, {"target_modules": ["q_proj"]}, None), "v_proj: .*does not name"),
    "no list": ((llama, {}, {"target_modules": []}, None), "q_proj: .*target_modules"),
    "another expression": (
        (llama, {}, {"target_modules": r".*\.q_proj"}, None), "v_proj: .*does not name"),
    "excluded": ((llama, {}, {"exclude_modules": ["v_proj"]}, None), "v_proj: .*exclude_modules"),
    "excluded by an expression": (
        (llama, {}, {"exclude_modules": r".*\.1\..*"}, None), r"layers\.1\..*exclude_modules"),
    "fewer layers": (
        (llama, {}, {"layers_to_transform": [0]}, None), r"layers\.1\..*layers_to_transform"),
    "other layers": (
        (llama, {}, {"layers_to_transform": 1, "layers_pattern": ["layers"]}, None),
        r"layers\.0\..*layers_to_transform"),
    "no such layers": (
        (llama, {}, {"layers_to_transform": [0, 1], "layers_pattern": "blocks"}, None),
        r"layers\.0\..*layers_to_transform"),
    "inside of what is replaced": (
        (llama, {}, {"modules_to_save": ["self_attn"]}, None), "q_proj: .*modules_to_save"),
    "a head that is replaced, and nothing of it": (
        (llama, {"modules_to_save": ["lm_head"]}, {}, lacking("lm_head")),
        r"lm_head.weight: .*modules_to_save names lm_head, and the adapter lacks it"),
    "an embedding that is replaced, and nothing of it": (
        (llama, {}, {"modules_to_save": ["embed_tokens"]}, None),
        r"embed_tokens.weight: .*modules_to_save"),
    "a tied head that is replaced, and nothing of it": (
        (lambda: llama(tie_word_embeddings=True), {}, {"modules_to_save": ["lm_head"]}, None),
        r"lm_head.weight: .*modules_to_save"),
    "half of a module that is replaced": (
        (gpt2, {"target_modules": ["c_attn"], "modules_to_save": ["ln_f"]}, {},
         lacking("ln_f.bias")), r"ln_f.bias: .*modules_to_save names transformer.ln_f"),
    "lengths, and no word of DoRA": (
        (llama, {"use_dora": True}, {"use_dora": "absent"}, None), "use_dora is not set"),
    "lengths, and DoRA is null": (
        (llama, {"use_dora": True}, {"use_dora": None}, None), "use_dora is not set"),
    "lengths, and DoRA is false": (
        (llama, {"use_dora": True}, {"use_dora": False}, None), "use_dora is not set"),
    "biases of factors, and no word of them": (
        (biased, {"lora_bias": True}, {"lora_bias": "absent"}, None), "lora_bias is not set"),
    "a bias in a layer that is not wrapped": (
        (biased, {"bias": "all"}, {}, renamed("k_proj.bias", "k_proj.base_layer.bias")),
        r"k_proj.base_layer.bias: .*does not select its layer"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_peft_leaves_out_or_cannot_load_is_refused(tmp_path: Path, case: str) -> None:
    (make, about, config, tensors), said = REFUSED[case]
    expected = write(tmp_path, make, 1, **{**CONFIG, **about}).state_dict()
    merge(passthrough(tmp_path), tmp_path / "whole")
    edit(tmp_path, config, tensors)
    theirs, _ = by_peft(tmp_path)
    assert theirs is None or any(not torch.equal(theirs[n], expected[n]) for n in expected)
    with pytest.raises(MismatchError, match=said):
        make_plan(load_recipe(passthrough(tmp_path)))


NOTED: dict[str, tuple[Edit, str]] = {
    "no factors of a name": ((llama, {}, {}, lacking("v_proj")), "layers.1.self_attn.v_proj"),
    "no factors of a layer": ((llama, {}, {}, lacking("layers.1.")), "layers.1.self_attn.q_proj"),
    "no factors of one module": (
        (llama, {}, {}, lacking("layers.1.self_attn.q_proj")),
        "selects model.layers.1.self_attn.q_proj, and"),
    "no factors of what an expression means": (
        (llama, {"target_modules": r".*\.(q|v)_proj"}, {}, lacking("v_proj")), "v_proj"),
    "a longer list": ((llama, {}, {"target_modules": ["q_proj", "v_proj", "up_proj"]}, None),
                      "selects model.layers.0.mlp.up_proj, model.layers.1.mlp.up_proj, and"),
    "no factors of the embedding": (
        (llama, {"target_modules": ["q_proj", "embed_tokens"]}, {}, lacking("embed_tokens")),
        "selects model.embed_tokens, and"),
    "no factors of experts": (
        (mixtral, {"target_parameters": ["mlp.experts.down_proj"], "target_modules": ["q_proj"]},
         {}, lacking("experts")), "selects mlp.experts.down_proj, and"),
}  # fmt: skip


@pytest.mark.parametrize("case", NOTED)
def test_what_peft_warns_of_is_noted(tmp_path: Path, case: str) -> None:
    (make, about, config, tensors), said = NOTED[case]
    write(tmp_path, make, 1, **{**CONFIG, **about})
    edit(tmp_path, config, tensors)
    theirs, warned = by_peft(tmp_path)
    assert theirs is not None
    assert warned
    (note,) = noted(tmp_path)
    assert said in note
    assert "PEFT warns" in note
    if case != "no factors of experts":  # whose names in the files are others
        for name, value in merge(passthrough(tmp_path), tmp_path / "out").items():
            torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-6)


def noted(folder: Path) -> list[str]:
    """Notes on what an adapter lacks, or holds in vain."""
    words = ("adapter_config.json", "modules_to_save", "applied here")
    notes = make_plan(load_recipe(passthrough(folder))).notes
    return [note for note in notes if any(word in note for word in words)]


SILENT: dict[str, Edit] = {
    "as it is": (llama, {}, {}, None),
    "names of other models": (
        llama, {}, {"target_modules": ["q_proj", "v_proj", "query_key_value", "c_attn"]}, None),
    "excluded, and not there": (llama, {}, {"exclude_modules": ["k_proj", "lm_head"]}, None),
    "all of its layers": (
        llama, {}, {"layers_to_transform": [0, 1], "layers_pattern": "layers"}, None),
    "replaced, and unknown": (llama, {}, {"modules_to_save": ["classifier", "score"]}, None),
    "replaced without a list": (
        llama, {"modules_to_save": ["lm_head"]}, {"modules_to_save": None}, None),
    "biases, and no word of them": (biased, {"bias": "all"}, {"bias": "none"}, None),
    "whole names": (llama, {}, {"target_modules": [
        f"model.layers.{layer}.self_attn.{x}_proj" for layer in (0, 1) for x in "qv"]}, None),
}  # fmt: skip


@pytest.mark.parametrize("case", SILENT)
def test_what_means_the_same_needs_no_word(tmp_path: Path, case: str) -> None:
    make, about, config, tensors = SILENT[case]
    write(tmp_path, make, 1, **{**CONFIG, **about})
    edit(tmp_path, config, tensors)
    theirs, warned = by_peft(tmp_path)
    assert theirs is not None
    assert not warned
    assert not noted(tmp_path)
    for name, value in merge(passthrough(tmp_path), tmp_path / "out").items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-6)


def test_names_of_an_earlier_peft_are_applied_and_told(tmp_path: Path) -> None:
    """Its wrapped layers were called as the layers themselves: today's PEFT finds no bias so."""
    expected = write(tmp_path, biased, 1, **CONFIG, bias="lora_only").state_dict()
    edit(tmp_path, {}, renamed(".base_layer.bias", ".bias"))
    theirs, _ = by_peft(tmp_path)
    assert theirs is not None
    found = merge(passthrough(tmp_path), tmp_path / "out")
    name = "model.layers.0.self_attn.v_proj.bias"
    assert torch.equal(found[name], expected[name])
    assert not torch.equal(theirs[name], expected[name])
    (note,) = noted(tmp_path)
    assert "bias and 1 more: applied here; today's PEFT leaves such tensors out" in note


def test_biases_that_are_said_and_not_there_are_noted(tmp_path: Path) -> None:
    write(tmp_path, biased, 1, **CONFIG)
    for bias in ("all", "lora_only"):
        edit(tmp_path, {"bias": bias})
        (note,) = noted(tmp_path)
        assert f"bias: {bias}" in note
    write(tmp_path / "without", llama, 1, **CONFIG)
    edit(tmp_path / "without", {"bias": "all"})
    assert not noted(tmp_path / "without")


def test_a_config_without_modules_is_said(tmp_path: Path) -> None:
    """PEFT has a list for each architecture, which here is what the adapter has."""
    write(tmp_path, llama, 1, **CONFIG)
    for value in (None, "absent"):
        edit(tmp_path, {"target_modules": value})
        theirs, _ = by_peft(tmp_path)
        assert theirs is not None
        (note,) = noted(tmp_path)
        assert "no target_modules" in note
        for name, tensor in merge(passthrough(tmp_path), tmp_path / str(value)).items():
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-6)


KINDS = [torch.int8, torch.int32, torch.int64, torch.uint8, torch.bool, torch.complex64,
         torch.float8_e4m3fn, torch.float8_e5m2]  # fmt: skip
PLACES: dict[str, tuple[dict[str, Any], str]] = {
    "factors": ({}, "lora_A"),
    "lengths": ({"use_dora": True}, "magnitude"),
    "biases of factors": ({"lora_bias": True}, "lora_B.bias"),
    "biases": ({"bias": "all"}, "k_proj.bias"),
    "norms": ({"modules_to_save": ["norm"]}, "model.norm.weight"),
    "a head": ({"modules_to_save": ["lm_head"]}, "lm_head.weight"),
    "an embedding": ({"modules_to_save": ["embed_tokens"]}, "embed_tokens.weight"),
    "an embedding's factors": ({"target_modules": ["q_proj", "embed_tokens"]}, "embedding_B"),
    "experts": ({"target_parameters": ["mlp.experts.down_proj"]}, "experts.lora_B"),
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_numbers_that_are_no_floats_are_refused_in_the_plan(tmp_path: Path, place: str) -> None:
    about, part = PLACES[place]
    make = mixtral if place == "experts" else biased
    write(tmp_path, make, 1, **{**CONFIG, **about})
    weights = tmp_path / "adapter1" / "adapter_model.safetensors"
    tensors = load_file(weights)
    assert any(part in name for name in tensors)
    for kind in KINDS:
        save_file({n: t.to(kind) if part in n else t for n, t in tensors.items()}, weights)
        with pytest.raises(MismatchError, match=f"{part}.*: it is stored as "):
            make_plan(load_recipe(passthrough(tmp_path)))
    for kind in (torch.float64, torch.float16, torch.bfloat16):
        save_file({n: t.to(kind) if part in n else t for n, t in tensors.items()}, weights)
        make_plan(load_recipe(passthrough(tmp_path)))


@pytest.mark.parametrize("place", ["factors", "experts", "an embedding's factors"])
def test_nor_are_they_merged_with_other_adapters(tmp_path: Path, place: str) -> None:
    about, part = PLACES[place]
    make = mixtral if place == "experts" else biased
    for number in (1, 2):
        write(tmp_path, make, number, **{**CONFIG, **about})
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("merge_method: ties\nmodels: [{model: adapter1}, {model: adapter2}]\n"
                      "output: adapter\n")  # fmt: skip
    merge_cli.plan(recipe)
    weights = tmp_path / "adapter1" / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({n: t.to(torch.int8) if part in n else t for n, t in tensors.items()}, weights)
    with pytest.raises(SourceError, match="it is stored as I8, not as F64, F32, BF16 or F16"):
        merge_cli.plan(recipe)


def test_a_head_for_classes_is_of_floats_too(tmp_path: Path) -> None:
    write(tmp_path, llama, 1, **CONFIG)
    score = {f"{PREFIX}score.weight": torch.ones(3, 16, dtype=torch.int8)}
    edit(tmp_path, {"task_type": "SEQ_CLS"}, lambda tensors: {**tensors, **score})
    with pytest.raises(MergeCliError, match="score.weight: .*it is stored as I8"):
        make_plan(load_recipe(passthrough(tmp_path)))


def test_a_counter_is_a_counter_as_in_the_model(tmp_path: Path) -> None:
    """What is no float in the model is replaced by its like, and by nothing else."""
    write(tmp_path, llama, 1, **CONFIG)
    file = tmp_path / "base" / "model.safetensors"
    save_file({**load_file(file), "model.norm.steps": torch.tensor(3)}, file, {"format": "pt"})
    name = f"{PREFIX}model.norm.steps"
    edit(tmp_path, {}, lambda tensors: {**tensors, name: torch.tensor(8)})
    merge(passthrough(tmp_path), tmp_path / "out")
    assert read_model(tmp_path / "out")["model.norm.steps"] == 8
    edit(tmp_path, {}, lambda tensors: {**tensors, name: torch.tensor(8.0)})
    with pytest.raises(MismatchError, match="stored as F32, not as I64, as in the model"):
        make_plan(load_recipe(passthrough(tmp_path)))
