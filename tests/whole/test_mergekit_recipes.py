"""mergekit's language: every kind of recipe that its documentation shows, on tiny models.

Each case says where mergekit shows its like; the recipes here are our own. That the numbers are
right is the business of the methods' own tests; a case says what else must hold.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from merge_cli.cli import app
from tests.support.tiny import Family, Tensors, llama_family, read_model, to_array
from tests.support.vocabularies import pair

Check = Callable[[Family, Tensors], None]


@dataclass(frozen=True)
class Case:
    """A recipe over base, a, b and c.

    Attributes:
        where: in mergekit's repository.
        dtype: of everything that is written.
    """

    name: str
    where: str
    recipe: str
    check: Check | None = None
    dtype: torch.dtype = torch.bfloat16


def layers_of(tensors: Tensors) -> int:
    return 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("model.layers."))


def is_stack(*parts: tuple[int, int]) -> Check:
    """Each output layer is a layer of a model: (number of the model, layer)."""

    def check(family: Family, merged: Tensors) -> None:
        assert layers_of(merged) == len(parts)
        for layer, (model, index) in enumerate(parts):
            for part in ("mlp.up_proj.weight", "self_attn.q_proj.weight", "input_layernorm.weight"):
                expected = family.models[model][f"model.layers.{index}.{part}"]
                assert torch.equal(merged[f"model.layers.{layer}.{part}"].float(), expected.float())

    return check


def is_average(*weights: float) -> Check:
    def check(family: Family, merged: Tensors) -> None:
        for name, value in merged.items():
            arrays = [to_array(model[name]) for model in family.models]
            expected = np.average(arrays[: len(weights)], axis=0, weights=weights)
            assert np.allclose(to_array(value), expected, rtol=2**-8, atol=1e-6), name

    return check


def is_graded(family: Family, merged: Tensors) -> None:
    """slerp with t from 0 to 1: the first layer is the base's, the last one the other model's."""
    for layer, model in ((0, family.models[0]), (3, family.models[1])):
        name = f"model.layers.{layer}.self_attn.k_proj.weight"
        assert torch.allclose(merged[name].float(), model[name].float(), atol=1e-3)


def is_scaled(family: Family, merged: Tensors) -> None:
    for name, value in merged.items():
        factor = 0.5 if "down_proj" in name else 1.0
        assert torch.equal(value.float(), family.models[0][name].float() * factor), name


def with_adapter(family: Family, merged: Tensors) -> None:
    a, b, _ = family.models
    for name, value in merged.items():
        own = to_array(a[name]) + (0.75 if name == ADAPTED else 0.0)
        expected = (own + to_array(b[name])) / 2
        assert np.allclose(to_array(value), expected, rtol=2**-8, atol=1e-6), name


ADAPTED = "model.layers.1.self_attn.q_proj.weight"


def write_adapter(folder: Path) -> None:
    """An adapter that adds 0.75 to every element of one matrix: alpha/r * B A = 3 * 0.5 * 0.5."""
    folder.mkdir()
    about = {"peft_type": "LORA", "r": 1, "lora_alpha": 3, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    stem = f"base_model.model.{ADAPTED.removesuffix('.weight')}"
    factors = {
        f"{stem}.lora_A.weight": torch.full((1, 16), 0.5),
        f"{stem}.lora_B.weight": torch.full((16, 1), 0.5),
    }
    save_file(factors, folder / "adapter_model.safetensors")


def has_two_bases(family: Family, merged: Tensors) -> None:
    """Layers 0 and 1 are base + (a - base), layers 2 and 3 are c + (b - c)."""
    for layer in range(4):
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        expected = family.models[layer // 2][name]
        assert torch.allclose(merged[name].float(), expected.float(), atol=1e-6), name


CASES = [
    Case("linear", "examples/linear.yml", """
models:
  - {model: a, parameters: {weight: 1.0}}
  - {model: b, parameters: {weight: 0.3}}
  - {model: c, parameters: {weight: 0.5}}
merge_method: linear
dtype: float16
""", is_average(1.0, 0.3, 0.5), torch.float16),
    Case("ties, gradients and filters for each model", "examples/ties.yml", """
models:
  - {model: a, parameters: {density: [1, 0.7, 0.1], weight: 1.0}}
  - {model: b, parameters: {density: 0.5, weight: [0, 0.3, 0.7, 1]}}
  - model: c
    parameters:
      density: 0.33
      weight:
        - {filter: mlp, value: 0.5}
        - value: 0
merge_method: ties
base_model: base
parameters: {normalize: true, int8_mask: true}
dtype: float16
""", None, torch.float16),
    Case("ties, not normalized", "examples/bio-merge.yml", """
models:
  - {model: a, parameters: {density: 0.5, weight: 0.5}}
  - {model: b, parameters: {density: 0.5, weight: 0.5}}
merge_method: ties
base_model: base
parameters: {normalize: false, int8_mask: true}
dtype: float16
""", None, torch.float16),
    Case("slerp of slices, gradients by filter", "examples/gradient-slerp.yml", """
slices:
  - sources:
      - {model: a, layer_range: [0, 4]}
      - {model: b, layer_range: [0, 4]}
merge_method: slerp
base_model: a
parameters:
  t:
    - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
    - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
    - value: 0.5
dtype: float16
""", is_graded, torch.float16),
    Case("slerp of models, gradients by filter", "examples/gradient-slerp.yml", """
models: [{model: a}, {model: b}]
merge_method: slerp
base_model: a
parameters:
  t:
    - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
    - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
    - value: 0.5
dtype: float16
""", is_graded, torch.float16),
    Case("stacked layers", "examples/orcamini-platy-44layer.yml", """
slices:
  - sources: [{model: a, layer_range: [0, 3]}]
  - sources: [{model: b, layer_range: [2, 4]}]
merge_method: passthrough
dtype: float16
""", is_stack((0, 0), (0, 1), (0, 2), (1, 2), (1, 3)), torch.float16),
    Case("stacked layers of models of different depth", "docs/merge_methods.md, passthrough", """
slices:
  - sources: [{model: a, layer_range: [0, 2]}]
  - sources: [{model: deep/b, layer_range: [3, 6]}]
  - sources: [{model: a, layer_range: [2, 4]}]
merge_method: passthrough
"""),
    Case("slices of models of different depth, merged", "README.md, slices", """
slices:
  - sources:
      - {model: a, layer_range: [0, 4], parameters: {weight: 2.0}}
      - {model: deep/b, layer_range: [2, 6]}
    parameters: {weight: 1.0}
merge_method: linear
"""),
    Case("arcee_fusion", "examples/arcee_fusion.yml", """
models: [{model: a}, {model: b}]
merge_method: arcee_fusion
base_model: a
dtype: bfloat16
"""),
    Case("nuslerp", "docs/merge_methods.md", """
models:
  - {model: a, parameters: {weight: 0.6}}
  - {model: b, parameters: {weight: 0.4}}
merge_method: nuslerp
parameters: {nuslerp_flatten: false, nuslerp_row_wise: true}
"""),
    Case("nuslerp of task vectors", "docs/merge_methods.md", """
models:
  - {model: a, parameters: {weight: 0.6}}
  - {model: b, parameters: {weight: 0.4}}
merge_method: nuslerp
base_model: base
"""),
    Case("multislerp", "docs/merge_methods.md", """
models:
  - {model: a, parameters: {weight: 0.6}}
  - {model: b, parameters: {weight: 0.4}}
  - {model: c, parameters: {weight: 0.2}}
merge_method: multislerp
base_model: base
parameters: {normalize_weights: true, eps: 1.0e-8}
"""),
    Case("karcher", "docs/merge_methods.md", """
models: [{model: a}, {model: b}, {model: c}]
merge_method: karcher
parameters: {max_iter: 10, tol: 1.0e-5}
"""),
    Case("task_arithmetic", "docs/merge_methods.md", """
models:
  - {model: a, parameters: {weight: 0.5}}
  - {model: b, parameters: {weight: -0.25}}
merge_method: task_arithmetic
base_model: base
parameters: {lambda: 0.9}
"""),
    *(
        Case(name, "docs/merge_methods.md", f"""
models:
  - {{model: a, parameters: {{weight: 0.5, density: 0.53{each}}}}}
  - {{model: b, parameters: {{weight: 0.4, density: 0.6{each}}}}}
merge_method: {name}
base_model: base
parameters: {{lambda: 1.0{of_all}}}
""")
        for name, each, of_all in (
            ("ties", "", ""),
            ("dare_linear", "", ", rescale: true"),
            ("dare_ties", "", ", int8_mask: true"),
            ("della", ", epsilon: 0.1", ""),
            ("della_linear", ", epsilon: 0.1", ", normalize: false"),
            ("breadcrumbs", ", gamma: 0.01", ""),
            ("breadcrumbs_ties", ", gamma: 0.01", ""),
        )
    ),
    Case("sce", "docs/merge_methods.md", """
models: [{model: a}, {model: b}]
merge_method: sce
base_model: base
parameters: {select_topk: 0.5}
"""),
    Case("ram", "docs/merge_methods.md", """
models: [{model: a}, {model: b}]
merge_method: ram
base_model: base
parameters: {epsilon: 1.0e-5}
"""),
    Case("ramplus_tl", "docs/merge_methods.md", """
models: [{model: a}, {model: b}]
merge_method: ramplus_tl
base_model: base
parameters: {epsilon: 1.0e-5, r: 0.1, alpha: 0.2}
"""),
    Case("model_stock", "docs/merge_methods.md", """
models: [{model: base}, {model: a}, {model: b}, {model: c}]
merge_method: model_stock
base_model: base
parameters: {filter_wise: false}
"""),
    Case("nearswap", "docs/merge_methods.md", """
models: [{model: a}]
merge_method: nearswap
base_model: base
parameters: {t: 0.001}
"""),
    Case("passthrough, scaled by filter", "docs/merge_methods.md", """
models:
  - model: a
    parameters:
      scale:
        - {filter: down_proj, value: 0.5}
        - value: 1.0
merge_method: passthrough
""", is_scaled),
    Case("passthrough of slices, scaled by filter", "docs/merge_methods.md", """
slices:
  - sources: [{model: a, layer_range: [0, 2]}]
  - sources:
      - model: a
        layer_range: [2, 4]
    parameters: {scale: [{filter: down_proj, value: 0.5}]}
parameters: {scale: [{filter: down_proj, value: 0.5}, {value: 1.0}]}
merge_method: passthrough
""", is_scaled),
    Case("a model that lists itself, and unknown keys without effect", "the wild", """
models:
  - model: base
  - {model: a, parameters: {weight: 1.0, density: 0.5}}
merge_method: ties
base_model: base
parameters: {int8_mask: true, embed_slerp: true}
dtype: bfloat16
"""),
    Case("models at length", "mergekit/common.py", """
models:
  - model: {model: {path: a, revision: null}, lora: null, override_architecture: LlamaForCausalLM}
  - model: {path: b}
merge_method: linear
parameters: {weight: 0.5}
out_dtype: torch.float32
dtype: bfloat16
""", is_average(0.5, 0.5), torch.float32),
    Case("a LoRA source", "README.md", """
models: [a+adapter, b]
merge_method: linear
parameters: {weight: 1.0}
""", with_adapter),
    Case("a slice with residual_weight", "mergekit/config.py", """
slices:
  - sources: [{model: a, layer_range: [0, 4]}]
    residual_weight: 0.5
merge_method: passthrough
"""),
    Case("a base for each slice", "mergekit/config.py", """
slices:
  - sources: [{model: a, layer_range: [0, 2]}, {model: base, layer_range: [0, 2]}]
    base_model: base
  - sources: [{model: b, layer_range: [2, 4]}, {model: c, layer_range: [2, 4]}]
    base_model: c
merge_method: task_arithmetic
base_model: base
parameters: {weight: 1.0}
""", has_two_bases),
    Case("several documents", "docs/multimerge.md", """
name: first-merge
merge_method: linear
models: [{model: a}, {model: b}]
parameters: {weight: 0.5}
---
name: second-merge
merge_method: slerp
base_model: first-merge
models: [{model: c}]
parameters: {t: 0.5}
---
merge_method: dare_ties
base_model: base
models:
  - {model: second-merge, parameters: {density: 0.6, weight: 0.5}}
  - {model: b, parameters: {density: 0.8, weight: 0.5}}
"""),
    Case("all documents named", "docs/multimerge.md", """
name: first-merge
merge_method: task_arithmetic
base_model: base
models: [{model: a, parameters: {weight: 0.5}}]
---
name: second-merge
merge_method: slerp
base_model: first-merge
models: [{model: b}]
parameters: {t: 0.3}
---
name: third-merge
merge_method: linear
models: [first-merge, second-merge]
parameters: {weight: 1.0}
"""),
    Case("modules of a text model", "mergekit/architecture/auto.py, `default`", """
merge_method: linear
modules:
  default:
    models: [{model: a}, {model: b}]
    parameters: {weight: 0.5}
""", is_average(0.5, 0.5)),
]  # fmt: skip
OWN = "tokenizer_source: base"
VOCABULARIES = [
    Case("tokenizer_source: union", "README.md", "tokenizer_source: union"),
    Case("tokenizer_source: base", "README.md", "tokenizer_source: base"),
    Case("tokenizer_source: a model", "README.md", "tokenizer_source: chat"),
    Case("tokenizer with tokens", "README.md", """
tokenizer:
  source: union
  tokens:
    <|im_start|>: {source: chat}
    <|im_end|>: {source: chat, force: true}
    <|renamed|>: {source: {kind: model_token, model: chat, token: <|im_start|>}}
    <|numbered|>: {source: {kind: model_token, model: base, token_id: 3}}
    <|unused|>: {source: {kind: zero}}
  pad_to_multiple_of: 16
"""),
    *(
        Case(f"chat_template: {name}", "README.md", f"chat_template: {name}\n{OWN}")
        for name in ("auto", "alpaca", "chatml", "llama3", "mistral", "exaone")
    ),
    Case("chat_template in Jinja", "README.md",
         "chat_template: \"{% for m in messages %}{{ m['content'] }}{% endfor %}\"\n" + OWN),
]  # fmt: skip


def run(recipe: Path, out: Path, *flags: str) -> Tensors:
    command = ["run", str(recipe), str(out), "--device", "cpu", "--threads", "1", *flags]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    return read_model(out)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_recipe_runs_unchanged(family: Family, case: Case) -> None:
    if "deep/" in case.recipe:
        llama_family(family.folder / "deep", layers=6, seed=1)
    if "+adapter" in case.recipe:
        write_adapter(family.folder / "adapter")
    flags = "--allow-crimes", "--lazy-unpickle", "--copy-tokenizer"
    merged = run(family.write(case.recipe), family.folder / "out", *flags)
    assert {value.dtype for value in merged.values()} == {case.dtype}
    assert all(bool(value.isfinite().all()) for value in merged.values())
    config = json.loads((family.folder / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == layers_of(merged)
    assert config["dtype"] == str(case.dtype).removeprefix("torch.")
    outside = {name for name in family.base if not name.startswith("model.layers.")}
    assert outside <= merged.keys()
    if case.check is not None:
        case.check(family, merged)
    again = run(family.folder / "out" / "merge_recipe.yaml", family.folder / "again")
    assert merged.keys() == again.keys()
    assert all(torch.equal(again[name], value) for name, value in merged.items())


@pytest.mark.parametrize("case", VOCABULARIES, ids=lambda case: case.name)
def test_vocabularies(tmp_path: Path, case: Case) -> None:
    pair(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    method = "merge_method: linear\nbase_model: base\nmodels: [base, chat]\n"
    recipe.write_text(method + "parameters: {weight: 0.5}\n" + case.recipe)
    if "chat_template" in case.recipe and OWN in case.recipe:
        recipe.write_text(recipe.read_text().replace("[base, chat]", "[base]"))
    merged = run(recipe, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    rows = len(merged["model.embed_tokens.weight"])
    assert rows == config["vocab_size"] == len(merged["lm_head.weight"])
    if "pad_to" in case.recipe:
        assert rows % 16 == 0
    assert (tmp_path / "out" / "tokenizer.json").exists()
