"""Stored copies of tied weights are one tensor, however often a source stores it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import merge_cli
from merge_cli.errors import MismatchError, SourceError
from merge_cli.options import MergeOptions
from merge_cli.planning.planner import load_recipe, make_plan
from tests.support.tiny import Tensors, llama_config, llama_tensors, read_model, write_model

SHARED = "shared.weight"
COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
T5 = {"model_type": "t5", "tie_word_embeddings": False, "is_encoder_decoder": True}
OPTIONS = MergeOptions(device="cpu", threads=1)


def model(seed: int, names: tuple[str, ...] = (SHARED,)) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    embedding = torch.randn(40, 8, generator=generator)
    layer = torch.randn(8, 8, generator=generator)
    found = {name: embedding.clone() for name in names}
    return {**found, "encoder.block.0.layer.0.SelfAttention.q.weight": layer}


def write(folder: Path, models: Mapping[str, Tensors], config: Mapping[str, Any]) -> None:
    for name, tensors in models.items():
        write_model(folder / name, tensors, config)


def merged(folder: Path, out: str, method: str = "task_arithmetic", **keys: Any) -> Tensors:
    recipe = folder / "recipe.yaml"
    document = {"merge_method": method, "base_model": "b", "models": ["x", "y"], **keys}
    recipe.write_text(yaml.safe_dump(document))
    return read_model(merge_cli.merge(recipe, folder / out, options=OPTIONS).path)


ALL = (SHARED, *COPIES)


@pytest.mark.parametrize("method", ["task_arithmetic", "dare_ties", "della"])
def test_copies_stay_copies(tmp_path: Path, method: str) -> None:
    """Random masks and settings are the tensor's, whatever its copies are called."""
    write(tmp_path, {"b": model(0, ALL), "x": model(1), "y": model(2, ALL)}, T5)
    weight = [{"filter": "encoder.embed", "value": 0.0}, {"value": 0.7}]
    more = {} if method == "task_arithmetic" else {"density": 0.5}
    models = [{"model": name, "parameters": {"weight": weight, **more}} for name in "xy"]
    found = merged(tmp_path, "out", method, models=models)
    assert found.keys() == model(0, ALL).keys()
    for name in COPIES:
        assert torch.equal(found[name], found[SHARED])
    write_model(tmp_path / "b", model(0), T5)
    once = merged(tmp_path, "once", method, models=models)
    assert once.keys() == model(0).keys()
    for name in once:
        assert torch.equal(once[name], found[name])


def test_a_source_that_stores_another_one_of_them(tmp_path: Path) -> None:
    write(tmp_path, {"b": model(0), "x": model(1, COPIES[:1]), "y": model(2, COPIES)}, T5)
    found = merged(tmp_path, "out")
    wanted = model(1)[SHARED] + model(2)[SHARED] - model(0)[SHARED]
    torch.testing.assert_close(found[SHARED], wanted)
    assert found.keys() == model(0).keys()


def test_what_differs_is_no_copy(tmp_path: Path) -> None:
    own = model(1, ALL)
    own[COPIES[0]][3, 5] += 1
    write(tmp_path, {"b": model(0, ALL), "x": own, "y": model(2)}, T5)
    found = merged(tmp_path, "out")
    y, b = model(2)[SHARED], model(0)[SHARED]
    for name in ALL:
        torch.testing.assert_close(found[name], own[name] + y - b)
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    line = f"x: {COPIES[0]} differs from {SHARED} (first at element 29)"
    assert any(line in note for note in report["notes"])


def test_what_differs_is_not_left_out(tmp_path: Path) -> None:
    own = model(1, ALL)
    own[COPIES[1]][0, 0] += 1
    write(tmp_path, {"b": model(0), "x": own, "y": model(2)}, T5)
    with pytest.raises(SourceError, match=f"differs from {SHARED} .first at element 0.") as raised:
        merged(tmp_path, "out")
    assert raised.value.tensor == COPIES[1]
    assert not (tmp_path / "out").exists()


def test_untied_embeddings_are_no_copies(tmp_path: Path) -> None:
    config = {"model_type": "bart", "tie_word_embeddings": False}
    write(tmp_path, {"b": model(0, ALL), "x": model(1), "y": model(2)}, config)
    with pytest.raises(MismatchError, match="encoder.embed_tokens.weight: missing from x"):
        merged(tmp_path, "out")


def test_the_head_of_an_encoder_is_its_embedding(tmp_path: Path) -> None:
    embedding, bias = "bert.embeddings.word_embeddings.weight", "cls.predictions.bias"
    head, other = "cls.predictions.decoder.weight", "cls.predictions.decoder.bias"

    def bert(seed: int) -> Tensors:
        generator = torch.Generator().manual_seed(seed)
        return {embedding: torch.randn(20, 4, generator=generator), bias: torch.randn(20)}

    def copies(found: Tensors) -> Tensors:
        return found | {head: found[embedding].clone(), other: found[bias].clone()}

    models = {name: bert(seed) for seed, name in enumerate("bxy")}
    models["b"] = copies(models["b"])
    write(tmp_path, models, {"model_type": "bert"})
    found = merged(tmp_path, "out", "dare_linear", parameters={"density": 0.5, "weight": 0.5})
    assert torch.equal(found[head], found[embedding])
    assert torch.equal(found[other], found[bias])
    assert not torch.equal(found[head], models["b"][embedding])


def test_what_the_class_ties(tmp_path: Path) -> None:
    """Whisper's `proj_out` is in no list here: transformers says what it is."""
    config = {"model_type": "whisper", "architectures": ["WhisperForConditionalGeneration"]}
    embedding, head = "model.decoder.embed_tokens.weight", "proj_out.weight"

    def whisper(seed: int) -> Tensors:
        return {embedding: torch.randn(20, 4, generator=torch.Generator().manual_seed(seed))}

    models = {name: whisper(seed) for seed, name in enumerate("bxy")}
    models["b"][head] = models["b"][embedding].clone()
    write(tmp_path, models, config)
    found = merged(tmp_path, "out")
    assert torch.equal(found[head], found[embedding])
    notes = make_plan(load_recipe(tmp_path / "recipe.yaml")).notes
    assert sum("one tensor, as b stores it" in note for note in notes) == 1


@pytest.mark.parametrize("equal", [True, False])
def test_a_stored_head_that_the_config_ties(tmp_path: Path, equal: bool) -> None:
    for seed, name in enumerate("bxy"):
        tensors = llama_tensors(torch.Generator().manual_seed(seed), layers=1)
        if name == "x":
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
            tensors["lm_head.weight"][7, 1] += not equal
        write_model(tmp_path / name, tensors, llama_config(layers=1))
    assert "lm_head.weight" not in merged(tmp_path, "out")
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    told = [note for note in report["notes"] if note.startswith("x: lm_head.weight differs")]
    assert len(told) == (not equal)
    assert all("`tie_word_embeddings: false`" in note for note in told)
