"""LoRA on experts, stored together or one by one: each gets the product that PEFT gives it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from merge_cli.errors import MismatchError
from merge_cli.planning.planner import load_recipe, make_plan
from tests.support.adapters import (
    EXPERTS,
    HIDDEN,
    assert_same,
    gpt_oss,
    merge,
    mixtral,
    passthrough,
    train,
)
from tests.support.tiny import read_model

peft = pytest.importorskip("peft")
pytest.importorskip("transformers.conversion_mapping")
pytestmark = pytest.mark.filterwarnings("ignore")
TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
PREFIX = "base_model.model.model.layers"


def qwen(inner: int = 12, **about: Any) -> Any:
    torch.manual_seed(0)
    return hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**{
        "vocab_size": 48, "hidden_size": HIDDEN, "intermediate_size": 24,
        "moe_intermediate_size": inner, "num_experts": EXPERTS, "num_experts_per_tok": 2,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
        "tie_word_embeddings": False, **about}))  # fmt: skip


def square() -> Any:
    """gate and up together are as high as wide: no shape tells which side is which."""
    return qwen(HIDDEN // 2)


CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "both": (qwen, hf.Qwen3MoeForCausalLM, {"target_parameters": TARGETS}),
    "down alone": (qwen, hf.Qwen3MoeForCausalLM, {"target_parameters": TARGETS[1:]}),
    "up alone": (qwen, hf.Qwen3MoeForCausalLM, {"target_parameters": TARGETS[:1]}),
    "by the old names": (qwen, hf.Qwen3MoeForCausalLM, {
        "target_modules": ["gate_proj", "up_proj", "down_proj", "q_proj", "gate"]}),
    "square": (square, hf.Qwen3MoeForCausalLM, {"target_parameters": TARGETS}),
    "patterns": (qwen, hf.Qwen3MoeForCausalLM, {
        "target_parameters": TARGETS, "use_rslora": True, "rank_pattern": {"gate_up_proj": 3},
        "alpha_pattern": {r"layers.1.mlp.experts.down_proj": 20}}),
    "mixtral": (mixtral, hf.MixtralForCausalLM, {
        "target_parameters": TARGETS, "target_modules": ["q_proj"]}),
    "gpt-oss": (gpt_oss, hf.GptOssForCausalLM, {
        "target_parameters": TARGETS, "target_modules": ["q_proj"]}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_all_experts_at_once(tmp_path: Path, case: str) -> None:
    make, kind, about = CASES[case]
    model = train(tmp_path, make, **{"target_modules": [], **about})
    assert_same(tmp_path, model, kind)


def products(folder: Path, name: str, scale: float) -> torch.Tensor:
    """B A of each expert."""
    tensors = load_file(folder / "adapter1" / "adapter_model.safetensors")
    a, b = (tensors[f"{PREFIX}.0.mlp.experts.{name}lora_{x}.weight"] for x in "AB")
    rank = len(a) // EXPERTS
    return torch.stack([
        scale * b[:, i::EXPERTS] @ a[i * rank : (i + 1) * rank] for i in range(EXPERTS)
    ])  # fmt: skip


@pytest.mark.parametrize("version", [None, "0.17.1", "0.18.1", "0.19.0", "0.19.1", "0.21.2"])
def test_square_experts_follow_the_version_that_wrote_them(
    tmp_path: Path, version: str | None
) -> None:
    train(tmp_path, square, target_modules=[], target_parameters=TARGETS)
    path = tmp_path / "adapter1" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "peft_version": version}))
    change = products(tmp_path, "base_layer.", 6 / 4)
    if version not in ("0.19.1", "0.21.2"):  # what 0.17, 0.18 and 0.19.0 computed
        change = change.transpose(1, 2)
        file = path.with_name("adapter_model.safetensors")  # down's factors were the other way
        tensors = load_file(file)
        for layer in (0, 1):
            for part in "AB":
                tensors.pop(f"{PREFIX}.{layer}.mlp.experts.lora_{part}.weight")
                name = f"{PREFIX}.{layer}.mlp.experts.base_layer.lora_{part}.weight"
                tensors[name.replace(".base_layer", "")] = tensors.pop(name)
        save_file(tensors, file)
        path.write_text(json.dumps({
            **json.loads(path.read_text()), "target_parameters": TARGETS[:1]}))  # fmt: skip
    base = read_model(tmp_path / "base")
    found = merge(passthrough(tmp_path), tmp_path / "out")
    for expert in range(EXPERTS):
        for half, name in enumerate(("gate_proj", "up_proj")):
            key = f"model.layers.0.mlp.experts.{expert}.{name}.weight"
            rows = change[expert, half * HIDDEN // 2 : (half + 1) * HIDDEN // 2]
            torch.testing.assert_close(found[key], base[key] + rows, rtol=1e-5, atol=1e-6)


def test_factors_of_an_older_version_are_told_by_their_shape(tmp_path: Path) -> None:
    train(tmp_path, qwen, target_modules=[], target_parameters=TARGETS[1:])
    folder = tmp_path / "adapter1"
    file = folder / "adapter_model.safetensors"
    torch.manual_seed(0)
    tensors = {
        f"{PREFIX}.{layer}.mlp.experts.lora_{part}.weight": torch.randn(shape) * 0.1
        for layer in (0, 1) for part, shape in (("A", (16, 16)), ("B", (12, 16)))
    }  # fmt: skip
    save_file(tensors, file)
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "peft_version": None}))
    change = products(tmp_path, "", 6 / 4).transpose(1, 2)
    base = read_model(tmp_path / "base")
    found = merge(passthrough(tmp_path), tmp_path / "out")
    for expert in range(EXPERTS):
        key = f"model.layers.0.mlp.experts.{expert}.down_proj.weight"
        torch.testing.assert_close(found[key], base[key] + change[expert], rtol=1e-5, atol=1e-6)


def stacked(folder: Path) -> None:
    """The base with its experts in one tensor each."""
    file = folder / "base" / "model.safetensors"
    tensors = load_file(file)
    for layer in (0, 1):
        prefix = f"model.layers.{layer}.mlp.experts"
        one = {
            name: torch.stack([
                tensors.pop(f"{prefix}.{i}.{name}.weight") for i in range(EXPERTS)])
            for name in ("gate_proj", "up_proj", "down_proj")
        }  # fmt: skip
        tensors[f"{prefix}.gate_up_proj"] = torch.cat([one["gate_proj"], one["up_proj"]], 1)
        tensors[f"{prefix}.down_proj"] = one["down_proj"]
    save_file(tensors, file, {"format": "pt"})


def test_stacked_files_give_what_single_ones_do(tmp_path: Path) -> None:
    train(tmp_path, qwen, target_modules=["q_proj"], target_parameters=TARGETS)
    single = merge(passthrough(tmp_path), tmp_path / "single")
    stacked(tmp_path)
    found = merge(passthrough(tmp_path), tmp_path / "out")
    for expert in range(EXPERTS):
        prefix = "model.layers.1.mlp.experts"
        up = torch.cat([single[f"{prefix}.{expert}.{n}.weight"] for n in ("gate_proj", "up_proj")])
        assert torch.equal(found[f"{prefix}.gate_up_proj"][expert], up)
        down = single[f"{prefix}.{expert}.down_proj.weight"]
        assert torch.equal(found[f"{prefix}.down_proj"][expert], down)


def test_single_experts_on_stacked_files(tmp_path: Path) -> None:
    """An adapter of transformers 4: a layer for each expert."""
    train(tmp_path, qwen, target_modules=["q_proj"])
    folder = tmp_path / "adapter1"
    torch.manual_seed(3)
    tensors = load_file(folder / "adapter_model.safetensors")
    for layer in (0, 1):
        for expert in (0, 2):
            for name, rows, columns in (("gate_proj", 12, 16), ("up_proj", 12, 16),
                                        ("down_proj", 16, 12)):  # fmt: skip
                prefix = f"{PREFIX}.{layer}.mlp.experts.{expert}.{name}"
                tensors[f"{prefix}.lora_A.weight"] = torch.randn(4, columns) * 0.1
                tensors[f"{prefix}.lora_B.weight"] = torch.randn(rows, 4) * 0.1
    save_file(tensors, folder / "adapter_model.safetensors")
    config = folder / "adapter_config.json"
    about = json.loads(config.read_text())
    about["target_modules"] += ["gate_proj", "up_proj", "down_proj"]
    config.write_text(json.dumps(about))
    single = merge(passthrough(tmp_path), tmp_path / "single")
    base = read_model(tmp_path / "base")
    key = "model.layers.0.mlp.experts.2.up_proj.weight"
    a, b = (tensors[f"{PREFIX}.0.mlp.experts.2.up_proj.lora_{part}.weight"] for part in "AB")
    torch.testing.assert_close(single[key], base[key] + 1.5 * b @ a, rtol=1e-5, atol=1e-6)
    stacked(tmp_path)
    found = merge(passthrough(tmp_path), tmp_path / "out")
    for expert in range(EXPERTS):
        prefix = "model.layers.0.mlp.experts"
        up = torch.cat([single[f"{prefix}.{expert}.{n}.weight"] for n in ("gate_proj", "up_proj")])
        assert torch.equal(found[f"{prefix}.gate_up_proj"][expert], up)
    bad = f"{PREFIX}.0.mlp.experts.9.up_proj"
    save_file({**tensors, f"{bad}.lora_A.weight": torch.zeros(4, 16),
               f"{bad}.lora_B.weight": torch.zeros(12, 4)},
              folder / "adapter_model.safetensors")  # fmt: skip
    with pytest.raises(MismatchError, match="the model has 4 experts"):
        make_plan(load_recipe(passthrough(tmp_path)))


def test_the_same_bytes_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path, qwen, target_modules=[], target_parameters=TARGETS)
    stacked(tmp_path)
    recipe = passthrough(tmp_path, dtype="bfloat16")
    whole = merge(recipe, tmp_path / "whole")
    from merge_cli.engine import memory
    from merge_cli.planning import chunks as units

    monkeypatch.setattr(units, "UNIT_BYTES", 1)
    for module in (units, memory):
        monkeypatch.setattr(module, "BLOCK_MULTIPLE", 24)
    monkeypatch.setattr(memory, "_HOST_BLOCK", 24)
    small = merge(recipe, tmp_path / "small")
    assert all(torch.equal(whole[name], small[name]) for name in whole)


def test_what_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    train(tmp_path, qwen, target_modules=[], target_parameters=TARGETS)
    folder = tmp_path / "adapter1"
    file, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors, about = load_file(file), json.loads(config.read_text())

    def error() -> str:
        with pytest.raises(MismatchError) as caught:
            make_plan(load_recipe(passthrough(tmp_path)))
        return str(caught.value)

    config.write_text(json.dumps({**about, "target_parameters": TARGETS[:1]}))
    assert "its factors are of 2 parameters, and target_parameters names" in error()
    config.write_text(json.dumps({**about, "r": 3}))
    assert "have the rank 4, but adapter_config.json says 3" in error()
    config.write_text(json.dumps(about))
    name = f"{PREFIX}.0.mlp.experts.lora_A.weight"
    save_file({**tensors, name: torch.zeros(15, 12)}, file)
    assert "are not those of 4 experts" in error()
    save_file({n: t for n, t in tensors.items() if n != name}, file)
    assert "lora_A and lora_B" in error()


def expert_adapters(folder: Path, make: Any = qwen, **about: Any) -> None:
    """Two adapters of one base."""
    for number in (2, 1):
        config = {"target_modules": ["q_proj"], "target_parameters": TARGETS, **about}
        train(folder, make, **{**config, "r": number + 1})
        (folder / "adapter1").rename(folder / f"lora{number}")


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
@pytest.mark.parametrize("make", [qwen, square, gpt_oss])
def test_merged_with_one_another(tmp_path: Path, make: Any, method: str) -> None:
    expert_adapters(tmp_path, make)
    recipe = tmp_path / "recipe.yaml"
    both: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": "lora1"}, {"model": "lora2"}],
        "parameters": {"weight": 0.5, "density": 0.6} if method == "ties" else {"weight": 0.5},
    }
    cut = {} if method == "task_arithmetic" else {"adapter": {"rank": 32}}
    recipe.write_text(json.dumps({**both, "output": cut or "adapter"}))
    import merge_cli

    merge_cli.merge(recipe, tmp_path / "adapter1")
    found = merge(passthrough(tmp_path), tmp_path / "found")
    models = [{"model": f"base+{one['model']}"} for one in both["models"]]
    recipe.write_text(json.dumps({**both, "models": models, "base_model": "base"}))
    base = read_model(tmp_path / "base")
    if method == "task_arithmetic":
        wanted = merge(recipe, tmp_path / "wanted")
        for name, tensor in wanted.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)
    assert any(not torch.equal(found[n], base[n]) for n in base if "experts" in n)
    kind = type(make())
    model = peft.PeftModel.from_pretrained(kind.from_pretrained(tmp_path / "base"),
                                           tmp_path / "adapter1").eval()  # fmt: skip
    assert_same(tmp_path, model, kind)


def test_square_factors_of_two_orders_are_not_mixed(tmp_path: Path) -> None:
    expert_adapters(tmp_path, square)
    config = tmp_path / "lora2" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "peft_version": "0.18.0"}))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("merge_method: task_arithmetic\nmodels: [{model: lora1}, {model: lora2}]\n"
                      "parameters: {weight: 1}\noutput: adapter\n")  # fmt: skip
    import merge_cli

    with pytest.raises(MismatchError, match=r"PEFT up to 0\.19\.0"):
        merge_cli.merge(recipe, tmp_path / "out")
