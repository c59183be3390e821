"""GPTQ and AWQ, one number at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from merge_cli.errors import CorruptFileError, SourceError
from merge_cli.formats import stored_matrix
from tests.support.quantised import assert_merges_alike, assert_numbers, opened
from tests.support.tiny import llama_config, llama_tensors, write_model

Parts = dict[str, torch.Tensor]


def words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes of each row in words of 32 bits, the first in the lowest bits."""
    rows = []
    for row in codes.tolist():
        whole = sum(code << (bits * i) for i, code in enumerate(row))
        count = -(-len(row) * bits // 32)
        rows.append([(whole >> (32 * i)) & 0xFFFFFFFF for i in range(count)])
    return torch.tensor(rows, dtype=torch.int64).to(torch.int32)


def random_parts(
    seed: int, outputs: int, inputs: int, bits: int, size: int, *, order: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes [in, out], zero points and scales [groups, out], group of inputs; the numbers."""
    generator = torch.Generator().manual_seed(seed)
    groups = -(-inputs // size)
    codes = torch.randint(0, 2**bits, (inputs, outputs), generator=generator)
    zeros = torch.randint(0, 2**bits, (groups, outputs), generator=generator)
    scales = (torch.rand(groups, outputs, generator=generator) / 50 + 0.001).half()
    group = torch.arange(inputs) // size
    if order:
        group = group[torch.randperm(inputs, generator=generator)]
    wanted = torch.empty(outputs, inputs)
    for o in range(outputs):
        for i in range(inputs):
            g = int(group[i])
            wanted[o, i] = float(codes[i, o] - zeros[g, o]) * scales[g, o].double()
    return codes, zeros, scales, group, wanted


def gptq(
    seed: int, outputs: int, inputs: int, bits: int, size: int, *, version: int = 1,
    order: bool = False, with_order: bool = True,
) -> tuple[Parts, torch.Tensor]:  # fmt: skip
    codes, zeros, scales, group, wanted = random_parts(
        seed, outputs, inputs, bits, size, order=order
    )
    stored = (zeros - 1) % 2**bits if version == 1 else zeros
    parts = {
        "qweight": words(codes.T, bits).T.contiguous(),
        "qzeros": words(stored, bits),
        "scales": scales,
    }
    if with_order:
        parts["g_idx"] = group.int()
    return parts, wanted


def awq(seed: int, outputs: int, inputs: int, size: int) -> tuple[Parts, torch.Tensor]:
    codes, zeros, scales, _, wanted = random_parts(seed, outputs, inputs, 4, size)

    def eights(matrix: torch.Tensor) -> torch.Tensor:
        """As AutoAWQ packs: the i-th four bits of a word have output order[i]."""
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        picked = matrix.reshape(len(matrix), -1, 8)[..., order].reshape(len(matrix), -1)
        return words(picked, 4)

    return {"qweight": eights(codes), "qzeros": eights(zeros), "scales": scales}, wanted


def about(method: str, bits: int = 4, size: int = 8, **more: Any) -> dict[str, Any]:
    settings = {"quant_method": method, "bits": bits, "group_size": size, **more}
    return {"quantization_config": settings}


def named(parts: Parts, module: str = "w") -> Parts:
    return {f"{module}.{name}": value for name, value in parts.items()}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("order", [False, True, None])
def test_gptq(tmp_path: Path, bits: int, version: int, order: bool | None) -> None:
    parts, wanted = gptq(
        bits, 96, 64, bits, 16, version=version, order=bool(order), with_order=order is not None
    )
    settings = about("gptq", bits, 16, checkpoint_format=("gptq", "gptq_v2")[version - 1])
    assert_numbers(write_model(tmp_path / "q", named(parts), settings), {"w.weight": wanted})


@pytest.mark.parametrize("size", [-1, 24])
def test_gptq_of_one_group_and_of_a_part_of_one(tmp_path: Path, size: int) -> None:
    parts, wanted = gptq(5, 32, 64, 4, 64 if size == -1 else size)
    folder = write_model(tmp_path / "q", named(parts), about("gptq", 4, size))
    assert_numbers(folder, {"w.weight": wanted})


def test_gptq_with_bits_of_single_modules(tmp_path: Path) -> None:
    """`dynamic`: what differs follows from the shapes."""
    stored: Parts = {}
    twin: Parts = {}
    for name, bits, size in (("a", 4, 16), ("b", 8, 32)):
        parts, twin[f"{name}.weight"] = gptq(bits, 32, 64, bits, size)
        stored |= named(parts, name)
    settings = about("gptq", 4, 16, dynamic={"+:b": {"bits": 8, "group_size": 32}})
    assert_numbers(write_model(tmp_path / "q", stored, settings), twin)


@pytest.mark.parametrize("size", [8, 32])
def test_awq(tmp_path: Path, size: int) -> None:
    parts, wanted = awq(size, 48, 32, size)
    settings = about("awq", 4, size, version="gemm", zero_point=True)
    assert_numbers(write_model(tmp_path / "q", named(parts), settings), {"w.weight": wanted})


@pytest.mark.parametrize("strip", [1, 300, 10**7])
def test_strips_of_any_width(tmp_path: Path, strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_matrix, "STRIP_BYTES", strip)
    monkeypatch.setattr(stored_matrix, "_SLAB_BYTES", 100)
    parts, wanted = gptq(3, 160, 32, 4, 8, order=True)
    folder = write_model(tmp_path / "q", named(parts), about("gptq", size=8, desc_act=True))
    assert_numbers(folder, {"w.weight": wanted})


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_models_merge_like_their_twins(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = llama_tensors(torch.Generator().manual_seed(0), layers=1, width=32)
    stored = {name: value.half() for name, value in plain.items()}
    twin = {name: value.float() for name, value in stored.items()}
    for seed, name in enumerate(list(plain)):
        if not name.endswith("_proj.weight"):
            continue
        module = name.removesuffix(".weight")
        outputs, inputs = stored.pop(name).shape
        make = gptq(seed, outputs, inputs, 4, 8, order=True) if method == "gptq" else awq(
            seed, outputs, inputs, 8
        )  # fmt: skip
        stored |= named(make[0], module)
        twin[name] = make[1]
    shape = {**llama_config(layers=1, width=32), "dtype": "float16"}
    folder = write_model(tmp_path / "q", stored, {**shape, **about(method)})
    assert_numbers(folder, twin)
    source = opened(folder)
    assert "quantization_config" not in source.config
    assert {tensor.default_dtype for tensor in source.tensors.values()} == {"F16"}
    assert_merges_alike(folder, twin, monkeypatch)


GPTQ_PARTS, GPTQ_NUMBERS = gptq(0, 32, 64, 4, 8)
AWQ_PARTS, _ = awq(0, 32, 64, 8)


@pytest.mark.parametrize(
    ("parts", "changed", "settings", "message"),
    [
        (GPTQ_PARTS, {"scales": None}, about("gptq"), "cannot be read without 'w.scales'"),
        (GPTQ_PARTS, {"qzeros": None}, about("gptq"), "cannot be read without 'w.qzeros'"),
        (GPTQ_PARTS, {"scales": torch.ones(7, 32).half()}, about("gptq"), "does not fit"),
        (GPTQ_PARTS, {"scales": torch.ones(8, 32).int()}, about("gptq"), "does not fit"),
        (GPTQ_PARTS, {"qzeros": torch.ones(8, 5).int()}, about("gptq"), "does not fit"),
        (GPTQ_PARTS, {"g_idx": torch.zeros(63).int()}, about("gptq"), "do not hold 63 codes"),
        (GPTQ_PARTS, {"g_idx": torch.zeros(32).int()}, about("gptq"), "do not hold 32 codes"),
        (GPTQ_PARTS, {"g_idx": torch.zeros(64)}, about("gptq"), "does not fit"),
        (GPTQ_PARTS, {"qweight": torch.ones(8, 32)}, about("gptq"), "GPTQ has I32 matrices"),
        (GPTQ_PARTS, {"weight": torch.ones(32, 64)}, about("gptq"), "a second time"),
        (GPTQ_PARTS, {}, about("gptq", bits=5), "of 5 bits"),
        (GPTQ_PARTS, {}, {"quantization_config": {"quant_method": "gptq", "bits": 4.0}}, "4.0"),
        (GPTQ_PARTS, {"scales": torch.ones(0, 32).half()}, about("gptq"), "GPTQ has matrices"),
        (GPTQ_PARTS, {}, about("gptq", bits=8), "do not hold 64 codes of 8 bits"),
        (GPTQ_PARTS, {}, about("gptq", size=-8), "a group_size of -8"),
        (GPTQ_PARTS, {}, about("gptq", size=0), "a group_size of 0"),
        (GPTQ_PARTS, {}, about("gptq", size=16), "do not follow from a group_size of 16"),
        (GPTQ_PARTS, {}, about("gptq", checkpoint_format="marlin"), "'marlin' is not read"),
        (GPTQ_PARTS, {}, {**about("gptq"), "model_type": "gpt2"}, "gpt2"),
        (AWQ_PARTS, {"scales": None}, about("awq"), "cannot be read without 'w.scales'"),
        (AWQ_PARTS, {"qzeros": torch.ones(8, 3).int()}, about("awq"), "does not fit"),
        (AWQ_PARTS, {"g_idx": torch.zeros(64).int()}, about("awq"), "belongs to no weight"),
        (AWQ_PARTS, {}, about("awq", bits=8), "AWQ of 8 bits"),
        (AWQ_PARTS, {}, about("awq", size=64), "do not follow"),
        (AWQ_PARTS, {}, about("awq", version="gemv"), "'gemv' is not read"),
        (AWQ_PARTS, {}, about("awq", zero_point=False), "without zero points"),
    ],
)
def test_what_does_not_fit_is_named(
    tmp_path: Path, parts: Parts, changed: Mapping[str, Any], settings: Any, message: str
) -> None:
    merged = {k: v.clone() for k, v in {**parts, **changed}.items() if v is not None}
    folder = write_model(tmp_path / "q", named(merged), settings)
    with pytest.raises(SourceError, match=message) as caught:
        opened(folder)
    assert str(folder) in caught.value.model


@pytest.mark.parametrize("bad", [-1, 8])
def test_groups_out_of_range(tmp_path: Path, bad: int) -> None:
    order = GPTQ_PARTS["g_idx"].clone()
    order[3] = bad
    folder = write_model(tmp_path / "q", named({**GPTQ_PARTS, "g_idx": order}), about("gptq"))
    with pytest.raises(CorruptFileError, match="names groups from"):
        assert_numbers(folder, {"w.weight": GPTQ_NUMBERS})
