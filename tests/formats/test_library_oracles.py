"""Formats against the libraries that define them, where those are installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.quantised import assert_numbers, numbers_of
from tests.support.tiny import write_model

ARGS: list[dict[str, Any]] = [
    {"num_bits": 4, "group_size": 32, "strategy": "group", "symmetric": True},
    {"num_bits": 4, "group_size": 32, "strategy": "group", "symmetric": False},
    {"num_bits": 4, "strategy": "channel", "symmetric": False},
    {"num_bits": 8, "strategy": "channel", "symmetric": True},
    {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16,
     "scale_dtype": "torch.float8_e4m3fn", "symmetric": True},
    {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32,
     "scale_dtype": "torch.uint8", "symmetric": True},
]  # fmt: skip
FORMATS = ["pack-quantized"] * 4 + ["nvfp4-pack-quantized", "mxfp4-pack-quantized"]


@pytest.mark.parametrize(("args", "kind"), list(zip(ARGS, FORMATS, strict=True)))
def test_compressed_tensors(tmp_path: Path, args: dict[str, Any], kind: str) -> None:
    """A weight that the library compresses is read as the numbers that it decompresses."""
    library = pytest.importorskip("compressed_tensors.quantization")
    compressors = pytest.importorskip("compressed_tensors.compressors.base")

    generator = torch.Generator().manual_seed(0)
    rows, columns = 24, 96
    weight = torch.randn(rows, columns, generator=generator)
    settings = library.QuantizationArgs(**args)
    compressor = compressors.BaseCompressor.get_value_from_registry(kind)
    across = columns // args["group_size"] if "group_size" in args else 1
    state = {"weight": weight, "weight_scale": torch.rand(rows, across, generator=generator) + 0.05}
    if kind.startswith("mxfp4"):
        state["weight_scale"] = torch.pow(2.0, torch.randint(-6, 2, (rows, across)).float())
    if kind.startswith("nvfp4"):
        state["weight_scale"] *= 300
        state["weight_global_scale"] = torch.tensor([190.0])
    if not args["symmetric"]:
        zero = torch.randint(-8, 8, (rows, across), generator=generator, dtype=torch.int8)
        state["weight_zero_point"] = zero
    scheme = library.QuantizationScheme(targets=["Linear"], weights=settings)
    stored = compressor.compress(state, scheme)
    wanted = compressor.decompress(dict(stored), scheme)["weight"]
    config = {"quantization_config": {
        "quant_method": "compressed-tensors", "format": kind,
        "config_groups": {"group_0": {"weights": args}},
    }}  # fmt: skip
    full = {f"w.{name}": value.contiguous() for name, value in stored.items()}
    folder = write_model(tmp_path / "q", full, config)
    if kind.startswith("pack"):
        assert_numbers(folder, {"w.weight": wanted.float()})
        return
    # The library rounds what it decompresses to bfloat16.
    found = numbers_of(folder)["w.weight"]
    assert torch.equal(found.to(wanted.dtype), wanted)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_of_four_bits(tmp_path: Path, kind: str, nested: bool) -> None:
    """What the library quantises is read as what it dequantises, in float32 bit for bit."""
    bnb = pytest.importorskip("bitsandbytes.functional")

    weight = torch.randn(48, 128, generator=torch.Generator().manual_seed(0))
    codes, state = bnb.quantize_4bit(
        weight, blocksize=64, compress_statistics=nested, quant_type=kind
    )
    parts = {f"w.weight.{name}": value for name, value in state.as_dict(packed=True).items()}
    config = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    folder = write_model(tmp_path / "q", {"w.weight": codes, **parts}, config)
    found, wanted = numbers_of(folder)["w.weight"], bnb.dequantize_4bit(codes, state)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)


def test_bitsandbytes_of_eight_bits(tmp_path: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes.functional")

    weight = torch.randn(48, 128, generator=torch.Generator().manual_seed(0)).half()
    codes, maxima, _ = bnb.int8_vectorwise_quant(weight)
    config = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
    folder = write_model(tmp_path / "q", {"w.weight": codes, "w.SCB": maxima}, config)
    assert_numbers(folder, {"w.weight": bnb.int8_vectorwise_dequant(codes, maxima)})


@pytest.mark.parametrize(
    ("mode", "bits", "group"),
    [("affine", bits, 64) for bits in (2, 3, 4, 5, 6, 8)] + [("mxfp4", 4, 32), ("nvfp4", 4, 16)],
)
def test_mlx(tmp_path: Path, mode: str, bits: int, group: int) -> None:
    """What the library quantises is read as what it dequantises."""
    mlx = pytest.importorskip("mlx.core")
    mlx.random.seed(0)
    weight = mlx.random.normal((24, 128))
    made = mlx.quantize(weight, group_size=group, bits=bits, mode=mode)
    wanted = mlx.dequantize(*made, group_size=group, bits=bits, mode=mode, dtype=mlx.float32)
    parts = zip(("weight", "scales", "biases"), made, strict=False)
    stored = {f"w.{name}": torch.from_numpy(np.array(value)) for name, value in parts}
    config = {"quantization": {"group_size": group, "bits": bits, "mode": mode}}
    found = numbers_of(write_model(tmp_path / "q", stored, config))["w.weight"]
    torch.testing.assert_close(found, torch.from_numpy(np.array(wanted)), rtol=1e-6, atol=1e-7)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_hqq(tmp_path: Path, bits: int) -> None:
    """What a layer saves is read as what it computes with."""
    library = pytest.importorskip("hqq.core.quantize")
    torch.manual_seed(0)
    settings = library.BaseQuantizeConfig(nbits=bits, group_size=64, axis=1)
    layer = library.HQQLinear(
        torch.nn.Linear(128, 64), settings, compute_dtype=torch.float32, device="cpu"
    )
    stored = {f"w.{name}": value.detach() for name, value in layer.state_dict().items()}
    config = {"quantization_config": {"quant_method": "hqq"}}
    folder = write_model(tmp_path / "q", stored, config)
    assert_numbers(folder, {"w.weight": layer.dequantize().detach(), "w.bias": stored["w.bias"]})
