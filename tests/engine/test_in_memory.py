"""A live model is what the engine writes, however transformers builds it from what is stored."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import transformers as hf
import yaml

import merge_cli
from merge_cli.engine.parameter_slices import find_parameter_slices
from merge_cli.errors import MismatchError
from merge_cli.evaluation.live import load
from merge_cli.evolve.mergeable import MergeableModel
from merge_cli.planning.planner import load_recipe
from merge_cli.recipe.reference import ModelRef
from merge_cli.sources.opening import open_source
from tests.support.dam_tiny import SIZES, write_experts, write_models
from tests.support.evolve_tiny import OPTIONS
from tests.support.tiny import read_model, write_model


@pytest.mark.parametrize("case", ["mixtral", "qwen3_moe", "upcycled", "untied source"])
def test_a_candidate_of_any_build_has_the_weights_that_the_engine_writes(
    tmp_path: Path, case: str
) -> None:
    """Experts that transformers stacks, experts that are equal in the base, a head of its own."""
    kind = {"upcycled": "mixtral", "untied source": "llama"}.get(case, case)
    of = hf.AutoConfig.for_model(kind, **SIZES, tie_word_embeddings=True)
    if kind == "llama":
        write_models(tmp_path, of, dtype=torch.bfloat16)
    else:
        write_experts(tmp_path, kind, dtype=torch.bfloat16)
    tensors = read_model(tmp_path / "base")
    if case == "upcycled":
        for name in [name for name in tensors if ".experts." in name]:
            tensors[name] = tensors[re.sub(r"experts\.\d+", "experts.0", name)].clone()
        about = json.loads((tmp_path / "base" / "config.json").read_text())
        write_model(tmp_path / "base", tensors, about)
    if case == "untied source":
        tensors = read_model(tmp_path / "a")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2
        write_model(tmp_path / "a", tensors, {**of.to_dict(), "tie_word_embeddings": False})
    recipe = tmp_path / "ties.yaml"
    recipe.write_text(yaml.safe_dump({
        "merge_method": "ties", "base_model": "base", "parameters": {"density": 0.5},
        "models": [{"model": "a"}, {"model": "b"}],
    }))  # fmt: skip
    merge_cli.merge(recipe, tmp_path / "out", options=OPTIONS)
    live = MergeableModel(load_recipe(recipe), OPTIONS, device="cpu")
    try:
        live.become(load_recipe(recipe))
        disk = load(open_source(ModelRef(str(tmp_path / "out")), tmp_path), device="cpu")
        ours = dict(live.live.net.named_parameters())
        theirs = dict(disk.net.named_parameters())
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    finally:
        live.close()


def test_a_parameter_that_nothing_stored_fills_is_named(tmp_path: Path) -> None:
    write_experts(tmp_path, "mixtral", dtype=torch.float32)
    recipe = tmp_path / "soup.yaml"
    recipe.write_text("merge_method: soup\nmodels: [{model: a}, {model: b}]\n")
    plan = merge_cli.plan(recipe)
    net = load(plan.sources[plan.config_index], device="cpu").net
    with torch.no_grad():
        dict(net.named_parameters())["model.layers.1.mlp.experts.down_proj"][0, 0, 0] += 1
    with pytest.raises(MismatchError, match="layers.1.mlp.experts.down_proj"):
        find_parameter_slices(plan, net)


def test_what_could_be_either_of_two_is_not_guessed(tmp_path: Path) -> None:
    """Two norms of ones that the file calls otherwise."""
    of = hf.LlamaConfig(**SIZES)
    write_models(tmp_path, of, names=("a", "b"))
    for name in ("a", "b"):
        tensors = read_model(tmp_path / name)
        for norm, other in (("input_layernorm", "n1"), ("post_attention_layernorm", "n2")):
            value = tensors.pop(f"model.layers.0.{norm}.weight")
            tensors[f"model.layers.0.{other}.weight"] = torch.ones_like(value)
        write_model(tmp_path / name, tensors, of.to_dict())
    recipe = tmp_path / "soup.yaml"
    recipe.write_text("merge_method: soup\nmodels: [{model: a}, {model: b}]\n")
    plan = merge_cli.plan(recipe)
    net = hf.LlamaForCausalLM(of)
    tensors = read_model(tmp_path / "a")
    net.load_state_dict(tensors, strict=False)
    with torch.no_grad():
        for norm in ("input_layernorm", "post_attention_layernorm"):
            dict(net.named_parameters())[f"model.layers.0.{norm}.weight"].fill_(1)
    with pytest.raises(MismatchError, match=r"layers.0.input_layernorm"):
        find_parameter_slices(plan, net)
    tensors["model.layers.0.n2.weight"] *= 2
    with torch.no_grad():
        dict(net.named_parameters())["model.layers.0.post_attention_layernorm.weight"].fill_(2)
    write_model(tmp_path / "a", tensors, of.to_dict())
    seats = find_parameter_slices(merge_cli.plan(recipe), net)
    second = dict(net.named_parameters())["model.layers.0.post_attention_layernorm.weight"]
    assert seats["model.layers.0.n2.weight"].parameter.data_ptr() == second.data_ptr()
