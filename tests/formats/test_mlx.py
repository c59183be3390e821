"""MLX's groups of columns, one number at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from merge_cli.errors import SourceError
from tests.support.quantised import assert_merges_alike, assert_numbers, opened
from tests.support.tiny import llama_config, llama_tensors, write_model

Parts = dict[str, torch.Tensor]
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]


def words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes of each row in words of 32 bits, the first in the lowest bits."""
    rows = []
    for row in codes.tolist():
        whole = sum(code << (bits * i) for i, code in enumerate(row))
        rows.append([(whole >> (32 * i)) & 0xFFFFFFFF for i in range(len(row) * bits // 32)])
    return torch.tensor(rows, dtype=torch.int64).to(torch.uint32)


def affine(
    seed: int, rows: int, columns: int, bits: int, group: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[Parts, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator)
    grid = (rows, columns // group)
    scales = (torch.rand(grid, generator=generator) / 50 + 0.001).to(dtype)
    biases = torch.randn(grid, generator=generator).to(dtype)
    wanted = torch.empty(rows, columns)
    for i in range(rows):
        for j in range(columns):
            scaled = codes[i, j].float() * scales[i, j // group].float()
            wanted[i, j] = scaled + biases[i, j // group].float()
    return {"weight": words(codes, bits), "scales": scales, "biases": biases}, wanted


def about(bits: int = 4, group: int = 32, **more: Any) -> dict[str, Any]:
    """As mlx-lm writes it: twice, and without the name of a method."""
    settings = {"group_size": group, "bits": bits, **more}
    return {"quantization": settings, "quantization_config": settings}


def named(parts: Parts, module: str = "w") -> Parts:
    return {f"{module}.{name}": value for name, value in parts.items()}


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_affine(tmp_path: Path, bits: int, group: int, dtype: torch.dtype) -> None:
    parts, wanted = affine(bits, 7, 128, bits, group, dtype)
    folder = write_model(tmp_path / "q", named(parts), about(bits, group))
    assert_numbers(folder, {"w.weight": wanted})


@pytest.mark.parametrize(("mode", "group"), [("mxfp4", 32), ("nvfp4", 16)])
def test_four_bit_floats(tmp_path: Path, mode: str, group: int) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (6, 64), generator=generator)
    shape = (6, 64 // group)
    if mode == "mxfp4":
        scales = torch.randint(115, 123, shape, generator=generator, dtype=torch.uint8)
        numbers = torch.pow(2.0, scales.float() - 127)
    else:
        numbers = (torch.rand(shape, generator=generator) * 3 + 0.1).to(torch.float8_e4m3fn)
        scales, numbers = numbers.view(torch.uint8), numbers.float()
    wanted = torch.tensor(E2M1)[codes] * numbers.repeat_interleave(group, 1)
    stored = named({"weight": words(codes, 4), "scales": scales})
    folder = write_model(tmp_path / "q", stored, about(4, group, mode=mode))
    assert_numbers(folder, {"w.weight": wanted})


def test_a_model_with_modules_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeddings are quantised, too; single modules have other bits, or none."""
    plain = llama_tensors(torch.Generator().manual_seed(0), layers=1, width=32)
    stored = {name: value.bfloat16() for name, value in plain.items()}
    twin = {name: value.float() for name, value in stored.items()}
    own: dict[str, Any] = {}
    for seed, name in enumerate(list(plain)):
        module = name.removesuffix(".weight")
        if "q_proj" in name:
            own[module] = False
        elif name.endswith("_proj.weight") or "embed" in name:
            bits = 8 if "down" in name else 4
            if bits == 8:
                own[module] = {"bits": 8, "group_size": 64}
            rows, columns = stored.pop(name).shape
            parts, twin[name] = affine(seed, rows, columns, bits, 64 if bits == 8 else 32)
            stored |= named(parts, module)
    folder = write_model(
        tmp_path / "q", stored, {**llama_config(layers=1, width=32), **about(**own)}
    )
    assert_numbers(folder, twin)
    assert not {"quantization", "quantization_config"} & opened(folder).config.keys()
    assert_merges_alike(folder, twin, monkeypatch)


def test_stacks_of_experts(tmp_path: Path) -> None:
    made = [affine(seed, 5, 64, 4, 32) for seed in range(3)]
    stored = {
        f"w.{part}": torch.stack([parts[part].view(torch.int32) if part == "weight" else parts[part]
                                  for parts, _ in made])
        for part in made[0][0]
    }  # fmt: skip
    stored["w.weight"] = stored["w.weight"].view(torch.uint32)
    wanted = torch.stack([numbers for _, numbers in made])
    assert_numbers(write_model(tmp_path / "q", stored, about()), {"w.weight": wanted})


GOOD, _ = affine(0, 4, 64, 4, 32)


@pytest.mark.parametrize(
    ("changed", "config", "message"),
    [
        ({"scales": None}, about(), "cannot be read without 'w.scales'"),
        ({"biases": None}, about(), "cannot be read without 'w.biases'"),
        ({"scales": torch.ones(4, 3)}, about(), "does not fit"),
        ({"biases": torch.ones(4, 2).int()}, about(), "does not fit"),
        ({"scales2.scales": torch.ones(2)}, about(), "belongs to no weight"),
        ({}, about(7), "codes of 7 bits"),
        ({}, about(4, -32), "a group_size of -32"),
        ({}, about(4, 0), "a group_size of 0"),
        ({}, about(4, 48), "are no groups of 48"),
        ({}, about(8, 32), "does not fit"),
        ({}, about(mode="mxfp8"), "the mode 'mxfp8'"),
        ({}, about(mode="mxfp4"), "does not fit"),
        ({}, about(w={"bits": 1, "group_size": 32}), "quantization of 'w': codes of 1 bits"),
    ],
)
def test_what_does_not_fit_is_named(
    tmp_path: Path, changed: Mapping[str, Any], config: Mapping[str, Any], message: str
) -> None:
    parts = {k: v.clone() for k, v in {**GOOD, **changed}.items() if v is not None}
    folder = write_model(tmp_path / "q", named(parts), config)
    with pytest.raises(SourceError, match=message):
        opened(folder)
