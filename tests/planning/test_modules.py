"""`modules:`, the parts of multimodal models: each merged by itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import merge_cli
from merge_cli.errors import MismatchError, RecipeError
from merge_cli.planning.layers import kind_of, known_modules, members
from merge_cli.planning.planner import load_recipe
from tests.support.tiny import Family, Tensors, merge, to_array, write_model

CONFIG: dict[str, Any] = {
    "model_type": "mistral3",
    "text_config": {"num_hidden_layers": 4, "layer_types": ["a", "b", "a", "b"]},
    "vision_config": {"num_hidden_layers": 3},
    "dtype": "float32",
}
TEXT, VISION = "language_model.model.layers", "vision_tower.transformer.layers"


def multimodal(generator: torch.Generator, *, text: int = 4, vision: int = 3) -> Tensors:
    """Random float32 tensors with Mistral 3's names."""
    shapes = {
        "language_model.model.embed_tokens.weight": (12, 8),
        **{f"{TEXT}.{i}.mlp.up_proj.weight": (16, 8) for i in range(text)},
        **{f"{TEXT}.{i}.self_attn.q_proj.weight": (8, 8) for i in range(text)},
        "language_model.model.norm.weight": (8,),
        "language_model.lm_head.weight": (12, 8),
        "vision_tower.patch_conv.weight": (4, 3, 2, 2),
        **{f"{VISION}.{i}.ffn_norm.weight": (4,) for i in range(vision)},
        "multi_modal_projector.linear_1.weight": (8, 4),
    }
    return {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture
def eyes(tmp_path: Path) -> Family:
    """A base and three others, with text, vision and a projector."""
    generator = torch.Generator().manual_seed(0)
    written = [multimodal(generator) for _ in range(4)]
    for name, tensors in zip(("base", "a", "b", "c"), written, strict=True):
        write_model(tmp_path / name, tensors, CONFIG)
    return Family(tmp_path, written[0], written[1:])


def recipe(eyes: Family, modules: Mapping[str, Any], method: str = "linear", **keys: Any) -> Path:
    return eyes.write({"merge_method": method, "modules": dict(modules), **keys})


def weighted(models: list[Tensors], name: str, weights: list[float]) -> np.ndarray:
    weighed = [w * to_array(m[name]) for w, m in zip(weights, models, strict=True)]
    return np.sum(weighed, axis=0) / sum(weights)


def models(*weights: float) -> list[dict[str, Any]]:
    pairs = zip(("a", "b"), weights, strict=True)
    return [{"model": name, "parameters": {"weight": weight}} for name, weight in pairs]


def close(tensor: torch.Tensor, expected: np.ndarray) -> bool:
    return bool(np.allclose(to_array(tensor), expected, rtol=1e-6, atol=1e-7))


def test_each_module_is_merged_with_its_own_models(eyes: Family) -> None:
    path = recipe(
        eyes,
        {
            "text_decoder": {"models": models(1.0, 3.0)},
            "vision_tower": {"models": models(2.0, 1.0)},
            "multi_modal_projector": {"models": ["a"]},
        },
    )
    merged = merge(path, eyes.folder / "out")
    a, b, _ = eyes.models
    assert merged.keys() == a.keys()
    for name, value in merged.items():
        kind = kind_of(name)
        weights = {"text_decoder": [1.0, 3.0], "vision_tower": [2.0, 1.0]}.get(kind, [1.0, 0.0])
        assert close(value, weighted([a, b], name, weights)), name


@pytest.mark.parametrize("base", [True, False])
def test_what_is_in_no_module_is_copied_and_said(eyes: Family, base: bool) -> None:
    """mergekit writes a model without these tensors."""
    keys = {"base_model": "base"} if base else {}
    path = recipe(eyes, {"text_decoder": {"models": models(1.0, 1.0)}}, **keys)
    plan = merge_cli.plan(path)
    notes = {task.name: task.note for task in plan.tasks if task.action == "copy"}
    config_index = "base" if base else "a"
    why = f"in none of the recipe's modules: copied from {config_index}"
    assert notes["multi_modal_projector.linear_1.weight"] == why
    assert notes[f"{VISION}.2.ffn_norm.weight"] == why
    merged = merge(path, eyes.folder / "out")
    start = eyes.base if base else eyes.models[0]
    for name in notes:
        assert torch.equal(merged[name], start[name])
    assert merged.keys() == eyes.base.keys()


@pytest.mark.parametrize("method", ["linear", "ties", "slerp"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_is_copied_has_the_recipes_dtype(eyes: Family, method: str, dtype: str) -> None:
    listed = ["base", "a"] if method == "slerp" else models(0.5, 0.5)
    given = {"t": 0.5} if method == "slerp" else {}
    path = recipe(eyes, {"text_decoder": {"models": listed, "parameters": given}}, method,
                  base_model="base", dtype=dtype)  # fmt: skip
    merged = merge(path, eyes.folder / "out")
    wanted = getattr(torch, dtype)
    assert {tensor.dtype for tensor in merged.values()} == {wanted}
    name = f"{VISION}.2.ffn_norm.weight"
    assert torch.equal(merged[name], eyes.base[name].to(wanted))
    assert json.loads((eyes.folder / "out" / "config.json").read_text())["dtype"] == dtype


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_what_is_copied_may_be_computed(eyes: Family, dtype: str | None) -> None:
    """An embedding that no module has, with rows of padding."""
    words = {f"w{i}": i for i in range(11)} | {"<unk>": 11}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"}
    for name in ("base", "a", "b"):
        (eyes.folder / name / "tokenizer.json").write_text(json.dumps({"model": model}))
    path = recipe(eyes, {"vision_tower": {"models": models(1.0, 1.0)}}, "task_arithmetic",
                  base_model="base", tokenizer={"source": "base", "pad_to_multiple_of": 8},
                  **({"dtype": dtype} if dtype else {}))  # fmt: skip
    merged = merge(path, eyes.folder / "out")
    name = "language_model.model.embed_tokens.weight"
    rows = torch.cat([eyes.base[name], eyes.base[name].double().mean(0).float().expand(4, -1)])
    assert torch.equal(merged[name], rows.to(getattr(torch, dtype or "float32")))


def test_precedence(eyes: Family) -> None:
    """Source of a slice, slice, module, recipe, default; a level without a rule falls through."""
    halves: list[dict[str, Any]] = [
        {
            "sources": [
                {"model": "a", "layer_range": [0, 2], "parameters": {"scale": 2.0}},
            ],
            "parameters": {"scale": 3.0},
        },
        {"sources": [{"model": "a", "layer_range": [2, 4]}]},
    ]
    module = {"slices": halves, "parameters": {"scale": [{"filter": "mlp", "value": 5.0}]}}
    path = recipe(
        eyes,
        {"text_decoder": module, "vision_tower": {"models": ["a"]}},
        "passthrough",
        parameters={"scale": 7.0},
    )
    merged, a = merge(path, eyes.folder / "out"), eyes.models[0]
    factors = {
        f"{TEXT}.0.mlp.up_proj.weight": 2.0,
        f"{TEXT}.1.self_attn.q_proj.weight": 2.0,
        f"{TEXT}.2.mlp.up_proj.weight": 5.0,
        f"{TEXT}.3.self_attn.q_proj.weight": 7.0,
        f"{VISION}.0.ffn_norm.weight": 7.0,
        "multi_modal_projector.linear_1.weight": 1.0,  # in none: copied as it is
    }
    for name, factor in factors.items():
        assert close(merged[name], factor * to_array(a[name])), name
    del halves[0]["sources"][0]["parameters"]
    path = recipe(eyes, {"text_decoder": module}, "passthrough", parameters={"scale": 7.0})
    merged = merge(path, eyes.folder / "other")
    name = f"{TEXT}.0.mlp.up_proj.weight"
    assert close(merged[name], 3 * to_array(a[name]))


def test_slices_of_the_text_module_change_its_depth_alone(eyes: Family) -> None:
    pieces = [
        {"sources": [{"model": "a", "layer_range": [0, 3]}]},
        {"sources": [{"model": "b", "layer_range": [1, 4]}]},
    ]
    path = recipe(
        eyes,
        {"text_decoder": {"slices": pieces}, "vision_tower": {"models": ["b"]}},
        "passthrough",
    )
    merged = merge(path, eyes.folder / "out")
    a, b, _ = eyes.models
    source = [(a, 0), (a, 1), (a, 2), (b, 1), (b, 2), (b, 3)]
    for layer, (model, index) in enumerate(source):
        for part in ("mlp.up_proj.weight", "self_attn.q_proj.weight"):
            assert torch.equal(merged[f"{TEXT}.{layer}.{part}"], model[f"{TEXT}.{index}.{part}"])
    for after in ("language_model.model.norm.weight", "language_model.lm_head.weight"):
        assert torch.equal(merged[after], b[after])
    config = json.loads((eyes.folder / "out" / "config.json").read_text())
    assert config["text_config"]["num_hidden_layers"] == 6
    assert config["text_config"]["layer_types"] == ["a", "b", "a", "b", "a", "b"]
    assert config["vision_config"]["num_hidden_layers"] == 3


def test_gradients_run_over_the_layers_of_each_module(eyes: Family) -> None:
    path = recipe(
        eyes,
        {name: {"models": ["a"]} for name in ("text_decoder", "vision_tower")},
        "passthrough",
        parameters={"scale": [0.0, 1.0]},
    )
    found = {t.name: t.parameters.get("scale") for t in merge_cli.plan(path).tasks}
    assert [found[f"{VISION}.{i}.ffn_norm.weight"] for i in range(3)] == [[0.0], [0.5], [1.0]]
    text = [found[f"{TEXT}.{i}.mlp.up_proj.weight"] for i in range(4)]
    assert text == [[0.0], [pytest.approx(1 / 3)], [pytest.approx(2 / 3)], [1.0]]


def test_methods_on_task_vectors(eyes: Family) -> None:
    listed = [{"model": "a", "parameters": {"weight": 0.5}}]
    path = recipe(eyes, {"vision_tower": {"models": listed}}, "task_arithmetic", base_model="base")
    merged = merge(path, eyes.folder / "out")
    base, (a, _, _) = eyes.arrays(f"{VISION}.1.ffn_norm.weight")
    assert close(merged[f"{VISION}.1.ffn_norm.weight"], base + 0.5 * (a - base))
    assert torch.equal(
        merged[f"{TEXT}.1.mlp.up_proj.weight"], eyes.base[f"{TEXT}.1.mlp.up_proj.weight"]
    )


def test_the_resolved_recipe_gives_the_same_bytes(eyes: Family) -> None:
    path = recipe(
        eyes,
        {
            "text_decoder": {"models": models(1.0, 3.0), "parameters": {"normalize": False}},
            "vision_tower": {
                "slices": [{"sources": [{"model": "b", "layer_range": [0, 3]}]}],
            },
        },
    )
    out = merge_cli.merge(path, eyes.folder / "out").path
    assert len(load_recipe(out / "merge_recipe.yaml").modules) == 2
    again = merge_cli.merge(out / "merge_recipe.yaml", eyes.folder / "again").path
    files = ("model.safetensors", "config.json")
    assert all((out / f).read_bytes() == (again / f).read_bytes() for f in files)


def test_default_is_the_rest_and_parts_of_names_are_modules(eyes: Family) -> None:
    path = recipe(
        eyes,
        {"vision_tower.transformer": {"models": ["b"]}, "default": {"models": ["c"]}},
        "passthrough",
    )
    merged = merge(path, eyes.folder / "out")
    _, b, c = eyes.models
    for name, value in merged.items():
        assert torch.equal(value, (b if name.startswith(VISION) else c)[name])


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ({}, "must be a mapping of at least one module"),
        ({"text_decoder": {}}, "give either models or slices"),
        ({"text_decoder": {"models": ["a"], "slices": []}}, "give either models or slices"),
        ({"text_decoder": {"model": ["a"]}}, "Did you mean 'models'?"),
        ({"text_decoder": {"models": ["a"], "parameters": {"scael": 1}}}, "Did you mean 'scale'?"),
        ({"text_decoder": {"models": ["a", "b"]}}, "takes exactly 1 model"),
    ],
)
def test_mistakes_are_told(eyes: Family, modules: Mapping[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe(eyes, modules, "passthrough"))
    assert message in str(caught.value)
    assert all(problem.line for problem in caught.value.problems)


def test_modules_that_the_models_do_not_have(eyes: Family) -> None:
    path = recipe(eyes, {"audio_tower": {"models": ["a"]}}, "passthrough")
    with pytest.raises(MismatchError) as caught:
        merge_cli.plan(path)
    (problem,) = caught.value.problems
    assert "a has no tensors of a module 'audio_tower'" in problem.message
    assert (problem.line, problem.column) == (3, 3)
    path = recipe(eyes, {"vison_tower": {"models": ["a"]}}, "passthrough")
    with pytest.raises(MismatchError, match="Did you mean 'vision_tower'"):
        merge_cli.plan(path)


def test_modules_that_overlap(eyes: Family) -> None:
    modules = {"text_decoder": {"models": ["a"]}, "language_model": {"models": ["b"]}}
    with pytest.raises(MismatchError) as caught:
        merge_cli.plan(recipe(eyes, modules, "passthrough"))
    assert "belongs to 'language_model' and to 'text_decoder'" in str(caught.value)


def test_a_tower_keeps_its_layers(eyes: Family) -> None:
    output_slice = {"sources": [{"model": "a", "layer_range": [0, 2]}]}
    path = recipe(eyes, {"vision_tower": {"slices": [output_slice]}}, "passthrough")
    with pytest.raises(RecipeError, match="cannot be added to, left out or moved"):
        merge_cli.plan(path)


def test_models_and_modules_exclude_each_other(eyes: Family) -> None:
    path = recipe(eyes, {"text_decoder": {"models": ["a"]}}, models=["a"])
    with pytest.raises(RecipeError, match="give either models or modules, not both"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("visual.merger.mlp.0.weight", "multi_modal_projector"),
        ("visual.blocks.3.attn.proj.bias", "vision_tower"),
        ("model.visual.deepstack_merger_list.1.norm.weight", "multi_modal_projector"),
        ("model.language_model.layers.0.mlp.up_proj.weight", "text_decoder"),
        ("vision_tower.vision_model.encoder.layers.1.mlp.fc1.weight", "vision_tower"),
        ("lm_head.weight", "text_decoder"),
        ("model.audio_tower.layers.1.fc1.weight", "audio_tower"),
    ],
)
def test_kinds_of_tensors(name: str, kind: str) -> None:
    """Names of Qwen2-VL, Qwen3-VL, Gemma 3, Voxtral."""
    assert kind_of(name) == kind


def test_encoder_decoder_models() -> None:
    names = [
        "shared.weight", "encoder.block.0.layer.0.layer_norm.weight",
        "decoder.block.0.layer.1.EncDecAttention.q.weight", "lm_head.weight",
    ]  # fmt: skip
    listed = ["encoder", "decoder", "shared"]
    found = {module: members(module, listed, names) for module in listed}
    assert found == {
        "encoder": (names[1],), "decoder": (names[2],), "shared": (names[0], names[3])
    }  # fmt: skip
    assert known_modules(names) == ("text_decoder", "default")
