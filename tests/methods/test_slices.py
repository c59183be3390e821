"""Slices with every method: what is merged is what lies in the ranges, and nothing else.

The oracle is a merge of whole models whose layers were cut out by hand.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import merge_cli
from merge_cli.errors import MismatchError, RecipeError
from merge_cli.methods.method import Method
from merge_cli.methods.registry import all_methods
from tests.support.tiny import (
    Family,
    Tensors,
    llama_config,
    llama_family,
    merge,
    read_model,
    write_model,
)

STATIC = [m for m in all_methods() if m.plain]
SPANS = {"base": (0, 4), "a": (0, 4), "deep/b": (2, 6), "deep/c": (1, 5)}
PARAMETERS: dict[str, Any] = {"slerp": {"t": 0.3}, "nearswap": {"t": 0.01}}
EACH: dict[str, Any] = {"density": 0.6, "weight": 0.7, "gamma": 0.05, "epsilon": 0.1, "scale": 0.5}


def cut(tensors: Tensors, first: int, last: int) -> Tensors:
    """A model of some layers of another, numbered from 0."""
    found: Tensors = {}
    for name, value in tensors.items():
        if name.startswith("model.layers."):
            layer, rest = name.removeprefix("model.layers.").split(".", 1)
            if first <= int(layer) < last:
                found[f"model.layers.{int(layer) - first}.{rest}"] = value
        else:
            found[name] = value
    return found


@pytest.fixture
def depths(tmp_path: Path) -> Family:
    """base and a with 4 layers, deep/b and deep/c with 6; cut/NAME are the ranges by hand."""
    family = llama_family(tmp_path)
    llama_family(tmp_path / "deep", layers=6, seed=1)
    for name, span in SPANS.items():
        whole = read_model(tmp_path / name)
        write_model(tmp_path / "cut" / name, cut(whole, *span), llama_config(layers=4))
    return family


def document(method: Method, *, sliced: bool) -> dict[str, Any]:
    """The same merge as one slice, or of the models that were cut by hand."""
    names = ["a", "deep/b", "deep/c"][: method.count[1] or 3]
    own = {
        n: v for n, v in EACH.items() if n in method.parameters and method.parameters[n].per_model
    }
    sources = []
    for name in names:
        source: dict[str, Any] = {"model": name if sliced else f"cut/{name}"}
        if sliced:
            source["layer_range"] = list(SPANS[name])
        sources.append({**source, "parameters": own} if own else source)
    found: dict[str, Any] = {"merge_method": method.name}
    if method.needs_base:
        found["base_model"] = "base" if sliced else "cut/base"
    elif method.base_is_source:
        found["base_model"] = sources[0]["model"]
    shared = PARAMETERS.get(method.name, {})
    parameters = {"parameters": shared} if shared else {}
    if sliced:
        if method.needs_base:  # the models' ranges differ, so that its own must be said
            sources.append({"model": "base", "layer_range": list(SPANS["base"])})
        return {**found, "slices": [{"sources": sources, **parameters}]}
    return {**found, "models": sources, **parameters}


@pytest.mark.parametrize("method", STATIC, ids=lambda method: method.name)
def test_a_slice_is_a_merge_of_cut_models(depths: Family, method: Method) -> None:
    """Models of different depth, each with a range of its own."""
    sliced = merge(depths.write(document(method, sliced=True)), depths.folder / "sliced")
    whole = merge(depths.write(document(method, sliced=False)), depths.folder / "whole")
    assert sliced.keys() == whole.keys()
    for name, value in whole.items():
        assert torch.equal(sliced[name], value), name


@pytest.mark.parametrize(("second", "refused"), [([2, 4], False), ([1, 3], True)])
@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_an_unlisted_base_lends_the_layers_that_all_models_have(
    depths: Family, method: str, second: list[int], refused: bool
) -> None:
    slices = [
        {"sources": [{"model": n, "layer_range": [0, 2]} for n in ("a", "deep/b")]},
        {"sources": [{"model": "a", "layer_range": [2, 4]},
                     {"model": "deep/b", "layer_range": second}]},
    ]  # fmt: skip
    recipe = depths.write({"merge_method": method, "base_model": "base", "slices": slices})
    if not refused:
        assert merge_cli.plan(recipe).tasks
        return
    with pytest.raises(RecipeError) as caught:
        merge_cli.plan(recipe)
    assert [(p.key, p.message) for p in caught.value.problems] == [
        ("slices[1]", "which layers of base belong to [1, 3], [2, 4] is not said")
    ]
    assert "List the base" in caught.value.problems[0].hint


@pytest.mark.parametrize("merge_method", ["passthrough", "linear"])
def test_slices_of_encoders_with_decoders_are_refused(tmp_path: Path, merge_method: str) -> None:
    """Also where one of both has as many layers as config.json counts."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_heads=2, num_layers=3, num_decoder_layers=2
    )
    for name in "ab":
        T5ForConditionalGeneration(config).save_pretrained(tmp_path / name)
    family = Family(tmp_path, {}, [])
    slices = [{"sources": [{"model": name, "layer_range": [0, 2]}]} for name in "ab"]
    with pytest.raises(MismatchError) as caught:
        merge_cli.plan(family.write({"merge_method": merge_method, "slices": slices}))
    first = caught.value.problems[0]
    assert first.message.endswith("counts in (decoder.block, encoder.block)")
    assert "`modules:`" in first.hint


ELEMENTWISE = [m for m in STATIC if m.name in ("soup", "task_arithmetic", "ties", "dare_ties",
               "della", "breadcrumbs", "slerp", "nuslerp", "karcher", "passthrough")]  # fmt: skip


@pytest.mark.parametrize("method", ELEMENTWISE, ids=lambda method: method.name)
def test_slices_do_not_see_one_another(depths: Family, method: Method) -> None:
    """Layers 4 to 7 of a stack of two slices are what the second slice alone would be.

    Random masks belong to the place of a tensor in the output: they are left out.
    """
    one = document(method, sliced=True)
    (piece,) = one["slices"]
    if "density" in method.parameters:
        for source in piece["sources"]:
            if method.name in ("dare_ties", "della") and source["model"] != "base":
                source["parameters"] = {**source["parameters"], "density": 1.0, **(
                    {"epsilon": 0.0} if method.name == "della" else {}
                )}  # fmt: skip
    other = {
        "sources": [dict(s) for s in piece["sources"]],
        **{k: v for k, v in piece.items() if k != "sources"},
    }
    for source in other["sources"]:
        first, last = source["layer_range"]
        source["layer_range"] = [first + 1, last]
    alone = merge(depths.write({**one, "slices": [other]}), depths.folder / "alone")
    both = merge(depths.write({**one, "slices": [piece, other]}), depths.folder / "both")
    first = merge(depths.write({**one, "slices": [piece]}), depths.folder / "first")
    layers = {int(n.split(".")[2]) for n in both if n.startswith("model.layers.")}
    assert layers == set(range(7))
    for name, value in both.items():
        if not name.startswith("model.layers."):
            continue
        layer, rest = name.removeprefix("model.layers.").split(".", 1)
        own, number = (first, int(layer)) if int(layer) < 4 else (alone, int(layer) - 4)
        assert torch.equal(value, own[f"model.layers.{number}.{rest}"]), name


def test_scale_by_filter_for_each_slice(depths: Family) -> None:
    """mergekit's way to weaken what repeated layers add."""
    halved = [
        {"filter": "o_proj", "value": 0.5},
        {"filter": "down_proj", "value": 0.25},
        {"value": 1.0},
    ]
    recipe = depths.write(
        {
            "merge_method": "passthrough",
            "slices": [
                {"sources": [{"model": "a", "layer_range": [0, 3]}]},
                {
                    "sources": [
                        {"model": "deep/b", "layer_range": [2, 5], "parameters": {"scale": halved}}
                    ]
                },
            ],
        }
    )
    merged = merge(recipe, depths.folder / "out")
    a, b = read_model(depths.folder / "a"), read_model(depths.folder / "deep" / "b")
    for name, value in merged.items():
        if name.startswith("model.layers."):
            layer, rest = name.removeprefix("model.layers.").split(".", 1)
            number = int(layer)
            model, index = (a, number) if number < 3 else (b, number - 1)
            factor = 1.0
            if number >= 3:
                factor = 0.5 if "o_proj" in rest else 0.25 if "down_proj" in rest else 1.0
            assert torch.equal(value, model[f"model.layers.{index}.{rest}"] * factor), name


def test_bases_of_slices_alone(family: Family) -> None:
    """No base for the recipe: each slice names its own, and the first gives the config."""
    halves = [
        {"sources": [{"model": "a", "layer_range": [0, 2]}], "base_model": "base"},
        {"sources": [{"model": "b", "layer_range": [2, 4]}], "base_model": "c"},
    ]
    recipe = {"merge_method": "task_arithmetic", "slices": halves, "parameters": {"weight": 0.5}}
    plan = merge_cli.plan(family.write(recipe))
    bases = {task.base.model for task in plan.tasks if task.base}
    assert bases == {"base", "c"}
    assert plan.sources[plan.config_index].label == "base"
    merged = merge(family.folder / "recipe.yaml", family.folder / "out")
    name = "model.layers.3.mlp.up_proj.weight"
    _, b, c = (model[name].float() for model in family.models)
    assert torch.allclose(merged[name].float(), (b + c) / 2, atol=2**-9)
    del halves[1]["base_model"]
    with pytest.raises(RecipeError, match="adds changes to a base model"):
        merge_cli.plan(family.write(recipe))


def test_a_range_that_a_shallow_model_has_not(depths: Family) -> None:
    recipe = depths.write(
        {
            "merge_method": "linear",
            "slices": [
                {
                    "sources": [
                        {"model": "deep/b", "layer_range": [2, 6]},
                        {"model": "a", "layer_range": [2, 6]},
                    ]
                }
            ],
        }
    )
    with pytest.raises(MismatchError, match="a has 4 layers, not 6"):
        merge_cli.plan(recipe)


def test_the_same_layers_again_and_again(family: Family) -> None:
    """Every layer twice, in place: the stack that depth up-scaling uses."""
    pieces = [
        {"sources": [{"model": "a", "layer_range": [layer, layer + 1]}]}
        for layer in range(4)
        for _ in range(2)
    ]
    merged = merge(
        family.write({"merge_method": "passthrough", "slices": pieces}), family.folder / "out"
    )
    for layer in range(8):
        name = "mlp.gate_proj.weight"
        expected = family.models[0][f"model.layers.{layer // 2}.{name}"]
        assert torch.equal(merged[f"model.layers.{layer}.{name}"], expected)
