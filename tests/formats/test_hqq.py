"""HQQ's layers, one number at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from merge_cli.errors import SourceError
from tests.support.quantised import assert_merges_alike, assert_numbers, opened
from tests.support.tiny import llama_config, llama_tensors, write_model

Parts = dict[str, torch.Tensor]
ABOUT = {"quantization_config": {"quant_method": "hqq"}}
PACKED = {8: ("8bit_u8", 1), 4: ("4bit_u8", 2), 3: ("3bit_32", 10), 2: ("2bit_u8", 4),
          1: ("1bit_u8", 8)}  # fmt: skip


def text(words: str) -> torch.Tensor:
    return torch.tensor(list(words.encode()), dtype=torch.uint8)


def layer(
    seed: int, rows: int, columns: int, bits: int, group: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[Parts, torch.Tensor]:
    """What a layer saves, and its numbers."""
    chosen = np.random.default_rng(seed)
    name, per_word = PACKED[bits]
    groups = rows * columns // group
    codes = chosen.integers(0, 2**bits, (groups, group))
    scale = torch.from_numpy(chosen.random((groups, 1)) / 50 + 0.001).to(dtype)
    zero = torch.from_numpy(chosen.random((groups, 1)) * 2**bits).to(dtype)
    step = -(-groups // per_word)
    words = np.zeros((step, group), np.int64)
    for number in range(groups):  # the first rows in the highest bits
        words[number % step] |= codes[number] << (bits * (per_word - 1 - number // step))
    wanted = np.empty((groups, group), np.float32)
    for number in range(groups):
        for k in range(group):
            offset = np.float32(codes[number, k]) - np.float32(zero[number, 0].float())
            wanted[number, k] = offset * np.float32(scale[number, 0].float())
    integer = torch.int32
    parts = {
        "W_q": torch.from_numpy(words).to(torch.int32 if bits == 3 else torch.uint8),
        "scale": scale, "zero": zero, "packing": text(name),
        "nbits": torch.tensor(bits, dtype=integer), "axis": torch.tensor(1, dtype=integer),
        "group_size": torch.tensor(group, dtype=integer), "shape": torch.tensor([rows, columns]),
        "unpack_view_dtype": text("torch.uint8"), "compute_dtype": text("torch.bfloat16"),
    }  # fmt: skip
    for flag in ("view_as_float", "quant_scale", "quant_zero", "offload_meta"):
        parts[flag] = torch.tensor(0, dtype=torch.uint8)
    for flag in ("encoded_state_dict", "stores_quant_config", "channel_wise"):
        parts[flag] = torch.tensor(1, dtype=torch.uint8)
    return parts, torch.from_numpy(wanted.reshape(rows, columns))


def named(parts: Parts, module: str = "w") -> Parts:
    return {f"{module}.{name}": value for name, value in parts.items()}


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("group", [16, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_layers(tmp_path: Path, bits: int, group: int, dtype: torch.dtype) -> None:
    parts, wanted = layer(bits, 16, 64, bits, group, dtype)
    folder = write_model(tmp_path / "q", named(parts), ABOUT)
    assert_numbers(folder, {"w.weight": wanted})


def test_codes_that_are_kept_as_floats(tmp_path: Path) -> None:
    """`view_as_float`, for training on several GPUs."""
    parts, wanted = layer(0, 16, 64, 4, 64)
    parts["W_q"] = parts["W_q"].view(torch.bfloat16)
    parts["view_as_float"] = torch.tensor(1, dtype=torch.uint8)
    folder = write_model(tmp_path / "q", named(parts), ABOUT)
    assert_numbers(folder, {"w.weight": wanted})


def test_models_merge_like_their_twins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = llama_tensors(torch.Generator().manual_seed(0), layers=1, width=32)
    stored = {name: value.bfloat16() for name, value in plain.items()}
    twin = {name: value.float() for name, value in stored.items()}
    for seed, name in enumerate(list(plain)):
        if name.endswith("_proj.weight"):
            rows, columns = stored.pop(name).shape
            parts, twin[name] = layer(seed, rows, columns, (4, 8, 2)[seed % 3], 16)
            stored |= named(parts, name.removesuffix(".weight"))
    folder = write_model(tmp_path / "q", stored, {**llama_config(layers=1, width=32), **ABOUT})
    assert_numbers(folder, twin)
    assert_merges_alike(folder, twin, monkeypatch)


GOOD, _ = layer(0, 16, 64, 4, 64)
ZERO = torch.tensor(0, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"scale": None}, "cannot be read without 'w.scale'"),
        ({"zero": None}, "cannot be read without 'w.zero'"),
        ({"shape": None}, "cannot be read without 'w.shape'"),
        ({"packing": None}, "cannot be read without 'w.packing'"),
        ({"scale": torch.ones(15, 1)}, "does not fit"),
        ({"zero": torch.ones(16, 1).int()}, "does not fit"),
        ({"shape": torch.tensor([16, 65])}, "do not divide"),
        ({"shape": torch.tensor([-16, -64])}, "do not divide"),
        ({"shape": torch.tensor([32, 64])}, "do not hold"),
        ({"group_size": -ZERO - 64}, "groups of -64"),
        ({"nbits": ZERO + 5}, "5 bits as '4bit_u8' are not read"),
        ({"packing": text("5bit_u8")}, "as '5bit_u8' are not read"),
        ({"axis": ZERO}, "along the axis 0"),
        ({"quant_zero": torch.tensor(1, dtype=torch.uint8)}, "quantised themselves"),
        ({"weight": torch.ones(16, 64)}, "a second time"),
        ({"meta_zero": torch.tensor(1, dtype=torch.uint8)}, "belongs to no weight"),
    ],
)
def test_what_does_not_fit_is_named(
    tmp_path: Path, changed: Mapping[str, Any], message: str
) -> None:
    parts = {k: v.clone() for k, v in {**GOOD, **changed}.items() if v is not None}
    folder = write_model(tmp_path / "q", named(parts), ABOUT)
    with pytest.raises(SourceError, match=message):
        opened(folder)
