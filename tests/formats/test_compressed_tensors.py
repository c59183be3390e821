"""Integers and numbers of four bits as compressed-tensors stores them, one number at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from merge_cli.checkpoint.tensors import read_numbers, reading
from merge_cli.errors import CorruptFileError, SourceError
from merge_cli.formats.detect import read_as_numbers
from tests.support.quantised import assert_merges_alike, assert_numbers, opened, stored_refs
from tests.support.tiny import llama_config, llama_tensors, write_model

E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]


def packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Unsigned codes [rows, columns] in words of 32 bits by rows, the first in the lowest bits."""
    words = []
    for row in codes.tolist():
        whole = sum(code << (bits * i) for i, code in enumerate(row))
        count = -(-len(row) * bits // 32)
        words.append([(whole >> (32 * i)) & 0xFFFFFFFF for i in range(count)])
    return torch.tensor(words, dtype=torch.int64).to(torch.int32)


def integers(
    seed: int, rows: int, columns: int, bits: int, groups: int, *, zeros: bool = False,
    order: bool = False, dtype: torch.dtype = torch.bfloat16,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:  # fmt: skip
    """A packed weight `w.weight`, and its numbers."""
    generator = torch.Generator().manual_seed(seed)

    def codes(*shape: int) -> torch.Tensor:
        return torch.randint(0, 2**bits, shape, generator=generator)

    stored = codes(rows, columns)
    scale = (torch.rand(rows, groups, generator=generator) / 50 + 0.001).to(dtype)
    zero = codes(rows, groups) if zeros else torch.full((rows, groups), 2 ** (bits - 1))
    group = torch.arange(columns) // (columns // groups)
    if order:
        group = group[torch.randperm(columns, generator=generator)]
    wanted = torch.empty(rows, columns)
    for i in range(rows):
        for j in range(columns):
            g = int(group[j])
            wanted[i, j] = float(stored[i, j] - zero[i, g]) * scale[i, g].double()
    tensors = {
        "w.weight_packed": packed(stored, bits),
        "w.weight_scale": scale,
        "w.weight_shape": torch.tensor([rows, columns]),
    }
    if zeros:
        tensors["w.weight_zero_point"] = packed(zero.T, bits).T.contiguous()
    if order:
        tensors["w.weight_g_idx"] = group.int()
    return tensors, wanted


def scheme(bits: Any, size: int | None, **more: Any) -> dict[str, Any]:
    strategy = "group" if size else "channel"
    weights = {"num_bits": bits, "type": "int", "strategy": strategy, "group_size": size,
               "symmetric": True, **more}  # fmt: skip
    return about(weights)


def about(*weights: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    groups = {
        f"group_{i}": {"targets": ["Linear"], "weights": dict(w)} for i, w in enumerate(weights)
    }
    return {"quantization_config": {
        "quant_method": "compressed-tensors", "config_groups": groups, **more,
    }}  # fmt: skip


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_packed_integers(
    tmp_path: Path, bits: int, groups: int, zeros: bool, dtype: torch.dtype
) -> None:
    tensors, wanted = integers(bits + groups, 11, 32, bits, groups, zeros=zeros, dtype=dtype)
    config = scheme(bits, 8 if groups == 4 else None, symmetric=not zeros)
    assert_numbers(write_model(tmp_path / "q", tensors, config), {"w.weight": wanted})


def test_columns_in_another_order(tmp_path: Path) -> None:
    tensors, wanted = integers(1, 6, 32, 4, 4, zeros=True, order=True)
    config = scheme(4, 8, symmetric=False, actorder="group")
    assert_numbers(write_model(tmp_path / "q", tensors, config), {"w.weight": wanted})


def test_columns_that_do_not_fill_their_words(tmp_path: Path) -> None:
    tensors, wanted = integers(2, 5, 13, 4, 1)
    assert_numbers(write_model(tmp_path / "q", tensors, scheme(4, None)), {"w.weight": wanted})


@pytest.mark.parametrize(("columns", "message"), [(32, ""), (13, "says \\[8, 13\\]")])
def test_a_file_that_is_not_here_yet(tmp_path: Path, columns: int, message: str) -> None:
    """As of a repository: what `weight_shape` says is derived, and checked when it is read."""
    tensors, wanted = integers(1, 8, columns, 4, 1)
    folder = write_model(tmp_path / "q", tensors)
    file = folder / "model.safetensors"
    refs = stored_refs(folder)
    file.rename(tmp_path / "elsewhere")
    weight = read_as_numbers(refs, scheme(4, None), "org/model").tensors["w.weight"]
    (tmp_path / "elsewhere").rename(file)
    with reading() as read:
        if not message:
            found = read_numbers(read, weight, 0, weight.size)
            assert found.tolist() == wanted.reshape(-1).tolist()
            return
        with pytest.raises(CorruptFileError, match=message):
            read_numbers(read, weight, 0, 5)


def test_stacks_of_matrices(tmp_path: Path) -> None:
    """As fused experts are compressed: zero points are packed in each matrix by itself."""
    parts = [integers(seed, 6, 16, 4, 2, zeros=True) for seed in range(3)]
    tensors = {
        name: torch.stack([stored[name] for stored, _ in parts])
        for name in parts[0][0]
        if not name.endswith("_shape")
    }
    tensors["w.weight_shape"] = torch.tensor([3, 6, 16])
    wanted = torch.stack([numbers for _, numbers in parts])
    config = scheme(4, 8, symmetric=False)
    assert_numbers(write_model(tmp_path / "q", tensors, config), {"w.weight": wanted})


def test_a_config_that_says_so_in_its_text_part(tmp_path: Path) -> None:
    tensors, wanted = integers(1, 8, 32, 4, 4)
    config = {"model_type": "kimi_k25", "text_config": {"hidden_size": 32, **scheme(4, 8)}}
    folder = write_model(tmp_path / "q", tensors, config)
    assert_numbers(folder, {"w.weight": wanted})
    assert opened(folder).config["text_config"] == {"hidden_size": 32}


def test_a_model_of_several_formats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """int4 by groups, int8 by rows, plain int8, fp8, NVFP4 and MXFP4 in one Llama."""
    generator = torch.Generator().manual_seed(0)
    plain = llama_tensors(generator, layers=1, tied=True, width=32)
    twin = {name: value.bfloat16().float() for name, value in plain.items()}
    stored = {name: value.bfloat16() for name, value in plain.items()}

    def put(name: str, parts: Mapping[str, torch.Tensor], numbers: torch.Tensor) -> None:
        full = f"model.layers.0.{name}"
        del stored[f"{full}.weight"]
        stored.update({f"{full}.{part}": value for part, value in parts.items()})
        twin[f"{full}.weight"] = numbers

    for name, rows, columns, bits, groups in (
        ("mlp.up_proj", 64, 32, 4, 4), ("mlp.down_proj", 32, 64, 8, 1)
    ):  # fmt: skip
        parts, numbers = integers(rows, rows, columns, bits, groups)
        put(name, {key.removeprefix("w."): value for key, value in parts.items()}, numbers)
    codes = torch.randint(-128, 128, (32, 32), generator=generator, dtype=torch.int8)
    scale = torch.rand(32, 1, generator=generator) / 100
    put("self_attn.q_proj", {"weight": codes, "weight_scale": scale}, codes * scale)
    fp8 = torch.randn(32, 32, generator=generator).to(torch.float8_e4m3fn)
    parts = {"weight": fp8, "weight_scale": scale.clone(), "input_scale": torch.ones(1)}
    put("self_attn.k_proj", parts, fp8.float() * scale)
    put("self_attn.v_proj", *nvfp4(1, 32, 32))
    put("mlp.gate_proj", *mxfp4(2, 64, 32))
    config = about(
        {"num_bits": 8, "type": "int", "strategy": "channel"},
        {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 8},
        {"num_bits": 8, "type": "float", "strategy": "channel"},
        format="mixed-precision",
    )
    shape = llama_config(layers=1, width=32)
    folder = write_model(tmp_path / "q", stored, {**shape, **config})
    assert_numbers(folder, twin)
    assert len(opened(folder).notes) == 7
    assert_merges_alike(folder, twin, monkeypatch)


def fp4(seed: int, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, columns // 2)
    codes = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    numbers = torch.empty(rows, columns, dtype=torch.float32)
    for i in range(rows):
        for j in range(columns):
            byte = int(codes[i, j // 2])
            numbers[i, j] = E2M1[byte >> 4 if j % 2 else byte & 15]
    return codes, numbers


def nvfp4(seed: int, rows: int, columns: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    codes, numbers = fp4(seed, rows, columns)
    scale = (torch.rand(rows, columns // 16) * 200 + 1).to(torch.float8_e4m3fn)
    whole = torch.tensor([2700.0])
    parts = {"weight_packed": codes, "weight_scale": scale, "weight_global_scale": whole}
    # The scale of a group in float32, then the number: as the library computes it.
    return parts, numbers * (scale.float() / whole).repeat_interleave(16, 1)


def mxfp4(seed: int, rows: int, columns: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    codes, numbers = fp4(seed, rows, columns)
    shape = (rows, columns // 32)
    scale = torch.randint(115, 122, shape, dtype=torch.uint8)
    powers = torch.pow(2.0, scale.float() - 127).repeat_interleave(32, 1)
    return {"weight_packed": codes, "weight_scale": scale}, numbers * powers


GOOD, _ = integers(0, 8, 32, 4, 4, zeros=True)
ASYMMETRIC = scheme(4, 8, symmetric=False)


@pytest.mark.parametrize(
    ("changed", "config", "message"),
    [
        ({"w.weight_scale": None}, ASYMMETRIC, "cannot be read without 'w.weight_scale'"),
        ({"w.weight_shape": None}, ASYMMETRIC, "cannot be read without 'w.weight_shape'"),
        ({"w.weight_packed": None}, ASYMMETRIC, "its weights are quantised"),
        ({"w.weight_zero_point": None}, ASYMMETRIC, "not symmetric"),
        ({}, scheme(4, 8, actorder="group"), "no weight_g_idx"),
        ({"w.weight_scale": torch.ones(8, 3)}, ASYMMETRIC, "fits no group"),
        ({"w.weight_scale": torch.ones(7, 4)}, ASYMMETRIC, "does not fit"),
        ({"w.weight_scale": torch.ones(8, 4).int()}, ASYMMETRIC, "does not fit"),
        ({"w.weight_zero_point": torch.ones(2, 4).int()}, ASYMMETRIC, "does not fit"),
        ({"w.weight_shape": torch.tensor([8, 31])}, ASYMMETRIC, "fits no group"),
        ({"w.weight_shape": torch.tensor([9, 32])}, ASYMMETRIC, "but the weight is"),
        ({"w.weight_shape": torch.tensor([-8, 32])}, ASYMMETRIC, "no shape"),
        ({"w.weight_shape": torch.tensor([8.0, 32.0])}, ASYMMETRIC, "whole numbers"),
        ({"w.weight_packed": torch.ones(8, 4)}, ASYMMETRIC, "packed integers are I32"),
        ({"w.weight": torch.ones(8, 32)}, ASYMMETRIC, "a second time"),
        ({"v.weight_scale": torch.ones(8, 32)}, ASYMMETRIC, "belongs to no weight"),
        ({"w.weight_scale": torch.ones(8, 0)}, ASYMMETRIC, "no scales"),
        ({}, scheme(4, None, symmetric=False), "fits no group"),
        (
            {},
            {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": []}},
            "fits no group",
        ),
        ({}, scheme("4", 8, symmetric=False), "integers of 4 bits are not read"),
        ({}, scheme(3, 8, symmetric=False), "integers of 3 bits are not read"),
        ({}, scheme(4, -8, symmetric=False), "a group_size of -8"),
        ({}, scheme(4, 16, symmetric=False), "fits no group"),
        ({}, about(format="marlin-24"), "'marlin-24' are not read"),
        ({}, about(sparsity_config={"format": "sparse-24-bitmask"}), "sparse-24-bitmask"),
        ({}, about(transform_config={"config_groups": {"a": {}}}), "rotated"),
    ],
)
def test_what_does_not_fit_is_named(
    tmp_path: Path, changed: Mapping[str, Any], config: Mapping[str, Any], message: str
) -> None:
    tensors = {k: v.clone() for k, v in {**GOOD, **changed}.items() if v is not None}
    folder = write_model(tmp_path / "q", tensors, config)
    with pytest.raises(SourceError, match=message) as caught:
        plan_of(folder)
    assert "q" in caught.value.model


def plan_of(folder: Path) -> None:
    from merge_cli.planning.planner import load_recipe, make_plan

    path = folder.parent / "recipe.yaml"
    path.write_text("merge_method: passthrough\nmodels: [{model: q}]\n")
    make_plan(load_recipe(path))


@pytest.mark.parametrize("bad", [-1, 4])
def test_groups_out_of_range(tmp_path: Path, bad: int) -> None:
    """Found while reading: the numbers of a tensor are not in its header."""
    tensors, wanted = integers(1, 6, 32, 4, 4, order=True)
    tensors["w.weight_g_idx"][5] = bad
    folder = write_model(tmp_path / "q", tensors, scheme(4, 8, actorder="group"))
    with pytest.raises(CorruptFileError, match="names groups from"):
        assert_numbers(folder, {"w.weight": wanted})
