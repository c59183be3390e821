"""fp8 inputs against float64: code times scale, whatever the layout of the scales."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import merge_cli
from merge_cli.errors import CorruptFileError, SourceError
from merge_cli.formats.small_floats import numbers_of
from merge_cli.options import MergeOptions
from merge_cli.planning.planner import load_recipe, make_plan
from tests.support.tiny import llama_config, llama_tensors, read_model, write_model

OPTIONS = MergeOptions(device="cpu", threads=1)
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}


def spread(scale: torch.Tensor, shape: torch.Size, block: tuple[int, int]) -> torch.Tensor:
    """Each element's scale, one loop at a time."""
    out = torch.empty(shape, dtype=torch.float64)
    for i in range(shape[-2]):
        for j in range(shape[-1]):
            at = scale.double()[..., i // block[0], j // block[1]]
            out[..., i, j] = at
    return out


def family(folder: Path, config: Mapping[str, Any], **replaced: Any) -> dict[str, torch.Tensor]:
    """A tiny Llama in bfloat16, some of its tensors replaced (None removes one)."""
    tensors = llama_tensors(torch.Generator().manual_seed(0), layers=1, tied=True)
    tensors = {name: value.bfloat16() for name, value in tensors.items()}
    for name, value in replaced.items():
        tensors[name] = value
    write_model(folder, tensors, {**llama_config(layers=1), **config})
    return tensors


def passthrough(folder: Path, name: str = "q", **keys: Any) -> dict[str, torch.Tensor]:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({
        "merge_method": "passthrough", "models": [{"model": name}], **keys,
    }))  # fmt: skip
    return read_model(merge_cli.merge(path, folder / "out", options=OPTIONS).path)


NAME = "model.layers.0.mlp.up_proj.weight"  # 32 x 16


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_all_codes(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(dtype).float().numpy()
    ours = numbers_of({E4M3: "F8_E4M3", E5M2: "F8_E5M2"}[dtype])
    np.testing.assert_array_equal(codes, ours)


@pytest.mark.parametrize(
    ("about", "ending", "shape", "block"),
    [
        ({**FP8, "weight_block_size": [8, 8]}, "_scale_inv", (4, 2), (8, 8)),
        ({**FP8, "weight_block_size": [12, 7]}, "_scale_inv", (3, 3), (12, 7)),  # partial blocks
        ({**FP8}, "_scale_inv", (4, 2), (8, 8)),  # derived
        ({"quant_method": "compressed-tensors", "config_groups": {
            "group_0": {"weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}}},
         "_scale", (32, 1), (1, 16)),
        ({"quant_method": "compressed-tensors", "config_groups": {
            "group_0": {"weights": {"num_bits": 8, "type": "float", "strategy": "tensor"}}}},
         "_scale", (1,), (32, 16)),
        ({"quant_method": "fbgemm_fp8"}, "_scale", (32, 1), (1, 16)),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "_scale", (), (32, 16)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_scales_of_every_layout(
    tmp_path: Path, about: Any, ending: str, shape: tuple[int, ...], block: tuple[int, int],
    scale_dtype: torch.dtype,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(32, 16, generator=generator).to(E4M3)
    scale = (torch.rand(shape, generator=generator) + 0.1).to(scale_dtype)
    extra = {NAME.replace(".weight", ".input_scale"): torch.ones(1)}
    family(tmp_path / "q", {"quantization_config": about},
           **{NAME: weight, f"{NAME}{ending}": scale, **extra})  # fmt: skip
    found = passthrough(tmp_path, dtype="float32")
    grid = scale.reshape(1, 1) if scale.numel() == 1 else scale
    wanted = weight.double() * spread(grid, weight.shape, block)
    torch.testing.assert_close(found[NAME].double(), wanted, rtol=1e-6, atol=0)
    assert not any("scale" in name for name in found)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config


def test_stacked_experts_and_exponents(tmp_path: Path) -> None:
    """[experts, rows, columns] with scales that are powers of two (E8M0)."""
    weight = torch.randn(3, 10, 8, generator=torch.Generator().manual_seed(2)).to(E4M3)
    codes = torch.randint(120, 134, (3, 3, 2), dtype=torch.uint8)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    about = {**FP8, "weight_block_size": [4, 4]}
    family(tmp_path / "q", {"quantization_config": about},
           **{name: weight, f"{name}_scale_inv": codes.view(torch.float8_e8m0fnu)})  # fmt: skip
    found = passthrough(tmp_path, dtype="float32")
    scale = torch.pow(2.0, codes.double() - 127)
    wanted = weight.double() * spread(scale, weight.shape, (4, 4))
    torch.testing.assert_close(found[name].double(), wanted, rtol=1e-6, atol=0)


def test_fp8_beside_bfloat16_is_merged_and_written_as_bfloat16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(32, 16, generator=generator).to(E4M3)
    scale = torch.rand(4, 2, generator=generator) + 0.1
    about = {**FP8, "weight_block_size": [8, 8]}
    family(tmp_path / "q", {"quantization_config": about},
           **{NAME: weight, f"{NAME}_scale_inv": scale})  # fmt: skip
    plain = family(tmp_path / "b", {})
    recipe = tmp_path / "soup.yaml"
    recipe.write_text("merge_method: soup\nmodels: [{model: q}, {model: b}]\n")
    found = read_model(merge_cli.merge(recipe, tmp_path / "soup", options=OPTIONS).path)
    wanted = (weight.double() * spread(scale, weight.shape, (8, 8)) + plain[NAME].double()) / 2
    assert found[NAME].dtype == torch.bfloat16
    torch.testing.assert_close(found[NAME].double(), wanted, rtol=2**-8, atol=1e-6)
    notes = make_plan(load_recipe(recipe)).notes
    assert any("1 fp8 weights are read as numbers" in note for note in notes)
    from merge_cli.engine import memory
    from merge_cli.planning import chunks as units

    monkeypatch.setattr(units, "UNIT_BYTES", 1)
    for module in (units, memory):
        monkeypatch.setattr(module, "BLOCK_MULTIPLE", 20)  # in the middle of rows and blocks
    monkeypatch.setattr(memory, "_HOST_BLOCK", 20)
    small = read_model(merge_cli.merge(recipe, tmp_path / "small", options=OPTIONS).path)
    assert all(torch.equal(found[name], small[name]) for name in found)


def test_fp8_without_scales(tmp_path: Path) -> None:
    weight = torch.randn(32, 16).to(E5M2)
    family(tmp_path / "q", {}, **{NAME: weight})
    found = passthrough(tmp_path)
    assert torch.equal(found[NAME], weight.bfloat16())


def test_scaled_files_of_comfyui(tmp_path: Path) -> None:
    """A scale of the tensor in front of the weight's name, and a tensor that marks the file."""
    weight = torch.randn(32, 16).to(E4M3)
    module = NAME.removesuffix("weight")
    extra = {f"{module}scale_weight": torch.tensor(0.25), f"{module}scale_input": torch.ones(()),
             "scaled_fp8": torch.zeros(2).to(E4M3)}  # fmt: skip
    family(tmp_path / "q", {}, **{NAME: weight, **extra})
    found = passthrough(tmp_path, dtype="float32")
    assert torch.equal(found[NAME], weight.float() / 4)
    assert not any("scale" in name for name in found)


@pytest.mark.parametrize("name", ["other.weight_scale_inv", "other.comfy_quant"])
def test_what_belongs_to_no_weight_is_told(tmp_path: Path, name: str) -> None:
    weight = torch.randn(32, 16).to(E4M3)
    family(tmp_path / "q", {}, **{NAME: weight, name: torch.ones(3, dtype=torch.uint8)})
    with pytest.raises(CorruptFileError, match="belongs to no weight"):
        make_plan(load_recipe(write_recipe(tmp_path)))


def test_scales_that_do_not_fit_are_told(tmp_path: Path) -> None:
    about = {**FP8, "weight_block_size": [8, 8]}
    weight = torch.randn(32, 16).to(E4M3)
    family(tmp_path / "q", {"quantization_config": about},
           **{NAME: weight, f"{NAME}_scale_inv": torch.ones(5, 3)})  # fmt: skip
    with pytest.raises(CorruptFileError, match=r"scales of shape \[5, 3\] do not fit"):
        make_plan(load_recipe(write_recipe(tmp_path)))
    family(tmp_path / "q", {"quantization_config": about},
           **{NAME: weight, f"{NAME}_scale_inv": torch.ones(0, 3)})  # fmt: skip
    with pytest.raises(CorruptFileError, match=r"scales of shape \[0, 3\] do not fit"):
        make_plan(load_recipe(write_recipe(tmp_path)))


def write_recipe(folder: Path) -> Path:
    path = folder / "recipe.yaml"
    path.write_text("merge_method: passthrough\nmodels: [{model: q}]\n")
    return path


@pytest.mark.parametrize(
    ("about", "hint"),
    [({"quant_method": "gptq", "bits": 4}, "unquantised"),
     ({"quant_method": "awq"}, "unquantised"),
     ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "unquantised"),
     ({"quant_method": "hqq"}, "unquantised"), ({"quant_method": "mxfp4"}, "unquantised"),
     ({"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {
         "num_bits": 4, "type": "int"}}}}, "unquantised"),
     ({"something": 1}, "unquantised")],
)  # fmt: skip
def test_other_quantisation_is_refused_with_what_to_do(
    tmp_path: Path, about: Any, hint: str
) -> None:
    family(tmp_path / "q", {"quantization_config": about})
    with pytest.raises(SourceError, match="its weights are quantised") as caught:
        make_plan(load_recipe(write_recipe(tmp_path)))
    assert hint in caught.value.hint


def test_gguf_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "model-q4.gguf").write_bytes(b"GGUF")
    with pytest.raises(SourceError, match="GGUF") as caught:
        make_plan(load_recipe(write_recipe(tmp_path)))
    assert "Name the file itself" in caught.value.hint
    assert "model-q4.gguf" in caught.value.hint
