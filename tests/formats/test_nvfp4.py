"""NVFP4 with ModelOpt's names, one number at a time, and in a model with fp8 layers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from merge_cli.errors import CorruptFileError
from tests.support.quantised import assert_merges_alike, assert_numbers, opened
from tests.support.tiny import llama_config, llama_tensors, write_model

E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
ABOUT = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}


def weight(seed: int, rows: int, columns: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, columns // 2)
    codes = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    scale = torch.rand(rows, columns // 16, generator=generator) * 400 + 1
    scale = scale.to(torch.float8_e4m3fn)
    second = torch.rand((), generator=generator) / 5000
    wanted = torch.empty(rows, columns)
    for i in range(rows):
        for j in range(columns):
            byte = int(codes[i, j // 2])
            number = E2M1[byte >> 4 if j % 2 else byte & 15]
            wanted[i, j] = number * (scale[i, j // 16].float() * second)
    return {"weight": codes, "weight_scale": scale, "weight_scale_2": second}, wanted


@pytest.mark.parametrize("about", [ABOUT, {}])
def test_a_model_with_fp8_and_bfloat16_beside(
    tmp_path: Path, about: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """ModelOpt says so in config.json, or in hf_quant_config.json alone."""
    plain = llama_tensors(torch.Generator().manual_seed(0), layers=1, width=32)
    stored = {name: value.bfloat16() for name, value in plain.items()}
    twin = {name: value.float() for name, value in stored.items()}
    for seed, name in enumerate(("self_attn.q_proj", "mlp.up_proj")):
        full = f"model.layers.0.{name}"
        parts, numbers = weight(seed, *twin[f"{full}.weight"].shape)
        stored.update({f"{full}.{part}": value for part, value in parts.items()})
        stored[f"{full}.input_scale"] = torch.ones(())
        twin[f"{full}.weight"] = numbers
    full = "model.layers.0.self_attn.k_proj"
    fp8 = stored[f"{full}.weight"].to(torch.float8_e4m3fn)
    stored[f"{full}.weight"], stored[f"{full}.weight_scale"] = fp8, torch.tensor(0.5)
    stored[f"{full}.k_scale"] = torch.ones(())
    twin[f"{full}.weight"] = fp8.float() * 0.5
    folder = write_model(tmp_path / "q", stored, {**llama_config(layers=1, width=32), **about})
    assert_numbers(folder, twin)
    if about:
        assert_merges_alike(folder, twin, monkeypatch)


def test_stacks_with_a_scale_for_each_matrix(tmp_path: Path) -> None:
    parts = [weight(seed, 5, 32) for seed in range(3)]
    stored = {
        f"w.{name}": torch.stack([stored[name] for stored, _ in parts]) for name in parts[0][0]
    }
    wanted = torch.stack([numbers for _, numbers in parts])
    assert_numbers(write_model(tmp_path / "q", stored, ABOUT), {"w.weight": wanted})


GOOD = {f"w.{name}": value for name, value in weight(0, 4, 32)[0].items()}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"w.weight_scale": None}, "cannot be read without"),
        ({"w.weight_scale": GOOD["w.weight_scale"].float()}, "does not fit"),
        ({"w.weight_scale": GOOD["w.weight_scale"][:, :1].contiguous()}, "does not fit"),
        ({"w.weight_scale_2": torch.ones(3)}, "does not fit"),
        ({"w.weight": GOOD["w.weight"][:, :9].contiguous()}, "in groups of 16 columns"),
        ({"v.weight_scale_2": torch.ones(())}, "belongs to no weight"),
        ({"v.weight": GOOD["w.weight"]}, "belongs to no weight"),
    ],
)
def test_what_does_not_fit_is_named(
    tmp_path: Path, changed: Mapping[str, Any], message: str
) -> None:
    tensors = {k: v.clone() for k, v in {**GOOD, **changed}.items() if v is not None}
    folder = write_model(tmp_path / "q", tensors, ABOUT)
    with pytest.raises(CorruptFileError, match=message):
        opened(folder)
