"""NaN is reported where it is: in the file of a weight, of an adapter, of a scale, or in none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import merge_cli
from merge_cli.errors import NonFiniteError
from merge_cli.options import MergeOptions
from tests.support.adapters import OPTIONS, llama, passthrough, write
from tests.support.vocabularies import EMBED, pair

pytestmark = pytest.mark.filterwarnings("ignore")
WEIGHT = "model.layers.0.self_attn.q_proj.weight"
FACTOR = f"base_model.model.{WEIGHT.removesuffix('.weight')}.lora_{{}}.weight"


def edit(file: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def refusal(folder: Path) -> str:
    """What a merge says, and that an analysis says it of the same tensor."""
    recipe = {
        "merge_method": "linear", "dtype": "float32",
        "models": [{"model": f"{folder / 'base'}+{folder / 'adapter1'}"}],
        "parameters": {"weight": 1.0},
    }  # fmt: skip
    with pytest.raises(NonFiniteError) as caught:
        merge_cli.merge(recipe, folder / "out", options=OPTIONS)
    with pytest.raises(NonFiniteError) as analysed:
        merge_cli.analyze(models=[str(folder / "base"), f"{folder / 'base'}+{folder / 'adapter1'}"])
    assert caught.value.tensor == analysed.value.tensor
    assert caught.value.file == analysed.value.file
    assert "No distance to such a model has a meaning" in str(analysed.value)
    assert "--allow-non-finite" in str(caught.value)
    return str(caught.value)


def put(name: str, value: float, at: tuple[int, ...]) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][at] = value

    return change


CASES: dict[str, tuple[dict[str, Any], str, tuple[int, ...], int]] = {
    "a factor": ({}, FACTOR.format("B"), (2, 1), 9),
    "the other factor": ({}, FACTOR.format("A"), (0, 3), 3),
    "a length": ({"use_dora": True}, FACTOR.format("magnitude_vector").removesuffix(".weight"),
                 (5,), 5),
    "a tensor that it brings": (
        {"modules_to_save": ["norm"]}, "base_model.model.model.norm.weight", (7,), 7),
}  # fmt: skip


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("case", CASES)
def test_what_an_adapter_holds_is_the_adapter_s(tmp_path: Path, case: str, value: float) -> None:
    about, name, at, element = CASES[case]
    write(tmp_path, llama, 1, r=4, target_modules=["q_proj"], **about)
    edit(tmp_path / "adapter1" / "adapter_model.safetensors", put(name, value, at))
    told = refusal(tmp_path)
    assert f"first at element {element})" in told
    assert "adapter1, adapter_model.safetensors, " in told
    assert name.removeprefix("base_model.model.") in told
    assert "Replace the file" in told


def test_what_the_base_holds_is_the_base_s(tmp_path: Path) -> None:
    write(tmp_path, llama, 1, r=4, target_modules=["q_proj"])
    edit(tmp_path / "base" / "model.safetensors", put(WEIGHT, float("nan"), (1, 2)))
    with pytest.raises(NonFiniteError, match="first at element 18") as caught:
        merge_cli.merge(passthrough(tmp_path), tmp_path / "out", options=OPTIONS)
    assert caught.value.file == "model.safetensors"
    assert caught.value.tensor == WEIGHT


def test_what_only_the_two_make_together_is_neither_s(tmp_path: Path) -> None:
    write(tmp_path, llama, 1, r=4, target_modules=["q_proj"])
    file = tmp_path / "adapter1" / "adapter_model.safetensors"
    for part in "AB":
        edit(file, put(FACTOR.format(part), 1e30, (0, 0)))
    told = refusal(tmp_path)
    assert "its numbers are finite, and what is computed from them has NaN or Inf" in told
    assert "model.safetensors and adapter_model.safetensors" in told
    assert "Replace the file" not in told
    allowed = MergeOptions(device="cpu", threads=1, allow_non_finite=True)
    merge_cli.merge(passthrough(tmp_path), tmp_path / "allowed", options=allowed)


def test_of_models_with_one_vocabulary_the_model_is_named(tmp_path: Path) -> None:
    pair(tmp_path, dtype=torch.float32)
    edit(tmp_path / "chat" / "model.safetensors", put(EMBED, float("nan"), (5, 2)))
    recipe = {
        "merge_method": "linear", "tokenizer_source": "union", "parameters": {"weight": 1.0},
        "models": [str(tmp_path / "base"), str(tmp_path / "chat")],
    }  # fmt: skip
    with pytest.raises(NonFiniteError, match=r"first at element 42\)") as caught:
        merge_cli.merge(recipe, tmp_path / "out", options=OPTIONS)
    assert caught.value.model == str(tmp_path / "chat")
    assert caught.value.tensor == EMBED


@pytest.mark.parametrize("part", ["code", "scale"])
def test_of_a_quantised_weight_the_part_is_named(tmp_path: Path, part: str) -> None:
    llama().save_pretrained(tmp_path / "base")
    scale = f"{WEIGHT}_scale_inv"

    def quantise(tensors: dict[str, torch.Tensor]) -> None:
        codes = tensors[WEIGHT].to(torch.float8_e4m3fn)
        if part == "code":
            codes.view(torch.uint8)[3, 1] = 0xFF
        tensors[WEIGHT] = codes
        tensors[scale] = torch.full((1, 1), float("inf") if part == "scale" else 1.0)

    edit(tmp_path / "base" / "model.safetensors", quantise)
    config = tmp_path / "base" / "config.json"
    about = json.loads(config.read_text())
    about["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config.write_text(json.dumps(about))
    with pytest.raises(NonFiniteError) as caught:
        merge_cli.merge(passthrough(tmp_path, "base"), tmp_path / "out", options=OPTIONS)
    assert caught.value.tensor == (scale if part == "scale" else WEIGHT)
    assert f"first at element {0 if part == 'scale' else 49})" in str(caught.value)
