"""bitsandbytes' nf4, fp4 and int8, one number at a time; adapters on them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from merge_cli.errors import SourceError
from tests.support.quantised import assert_merges_alike, assert_numbers, stored_refs
from tests.support.tiny import llama_config, llama_tensors, merge, write_model

Parts = dict[str, torch.Tensor]

# QLoRA, appendix E: the numbers of NormalFloat4.
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
       -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
       0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
       0.7229568362236023, 1.0]  # fmt: skip
ABOUT = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}


def text(**stated: Any) -> torch.Tensor:
    return torch.tensor(list(json.dumps(stated).encode()), dtype=torch.uint8)


def four_bits(
    seed: int, rows: int, columns: int, block: int = 64, *, nested: int = 0,
    storage: torch.dtype = torch.uint8,
) -> tuple[Parts, torch.Tensor]:  # fmt: skip
    """The parts of a weight behind its name, and its numbers.

    Args:
        nested: block size of the maxima, if those are codes.
    """
    chosen = np.random.default_rng(seed)
    size = rows * columns
    codes = chosen.integers(0, 16, size)
    blocks = -(-size // block)
    table = np.array(NF4, np.float32)
    stated = {
        "quant_type": "nf4",
        "blocksize": block,
        "dtype": "bfloat16",
        "shape": [rows, columns],
    }
    parts: Parts = {"quant_map": torch.from_numpy(table)}
    maxima = (chosen.random(blocks) + 0.01).astype(np.float32)
    if nested:
        inner = np.linspace(-1, 1, 256).astype(np.float32)
        outer = (chosen.random(-(-blocks // nested)) + 0.5).astype(np.float32)
        stored = chosen.integers(0, 256, blocks).astype(np.uint8)
        offset = 1.25
        for number in range(blocks):
            scaled = inner[stored[number]] * outer[number // nested]
            maxima[number] = scaled + np.float32(offset)
        parts |= {"absmax": torch.from_numpy(stored), "nested_quant_map": torch.from_numpy(inner),
                  "nested_absmax": torch.from_numpy(outer)}  # fmt: skip
        stated |= {"nested_blocksize": nested, "nested_dtype": "float32", "nested_offset": offset}
    else:
        parts["absmax"] = torch.from_numpy(maxima.copy())
    parts["quant_state.bitsandbytes__nf4"] = text(**stated)
    packed = np.append(codes, [0] * (size % 2)).reshape(-1, 2)
    raw = torch.from_numpy((packed[:, 0] * 16 + packed[:, 1]).astype(np.uint8))
    parts[""] = raw.view(storage).reshape(-1, 1)
    wanted = np.empty(size, np.float32)
    for number in range(size):
        wanted[number] = table[codes[number]] * maxima[number // block]
    return parts, torch.from_numpy(wanted.reshape(rows, columns))


def eight_bits(seed: int, rows: int, columns: int) -> tuple[Parts, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, (rows, columns), generator=generator, dtype=torch.int8)
    maxima = torch.rand(rows, generator=generator) + 0.1
    parts = {"weight": codes, "SCB": maxima, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return parts, codes.float() * maxima[:, None] * torch.tensor(7.874015718698502e-3)


def named(parts: Mapping[str, torch.Tensor], name: str = "w.weight") -> Parts:
    return {f"{name}.{part}" if part else name: value for part, value in parts.items()}


@pytest.mark.parametrize("nested", [0, 1, 3, 256])
@pytest.mark.parametrize(("rows", "columns", "block"), [(16, 128, 64), (5, 7, 64), (9, 33, 4)])
def test_four_bits(tmp_path: Path, nested: int, rows: int, columns: int, block: int) -> None:
    """Blocks are no rows: they begin and end in the middle of them."""
    parts, wanted = four_bits(nested, rows, columns, block, nested=nested)
    assert_numbers(write_model(tmp_path / "q", named(parts), ABOUT), {"w.weight": wanted})


def test_codes_that_are_kept_as_bfloat16(tmp_path: Path) -> None:
    """`bnb_4bit_quant_storage`, for training on several GPUs."""
    parts, wanted = four_bits(0, 16, 64, storage=torch.bfloat16)
    assert_numbers(write_model(tmp_path / "q", named(parts), ABOUT), {"w.weight": wanted})


def test_int8(tmp_path: Path) -> None:
    parts, wanted = eight_bits(0, 24, 40)
    stored = {f"w.{name}": value for name, value in parts.items()}
    assert_numbers(write_model(tmp_path / "q", stored, ABOUT), {"w.weight": wanted})


@pytest.fixture
def model(tmp_path: Path) -> tuple[Path, Parts]:
    plain = llama_tensors(torch.Generator().manual_seed(0), layers=1, width=32)
    stored = {name: value.bfloat16() for name, value in plain.items()}
    twin = {name: value.float() for name, value in stored.items()}
    for seed, name in enumerate(list(plain)):
        if not name.endswith("_proj.weight"):
            continue
        rows, columns = stored.pop(name).shape
        if "mlp" in name:
            parts, twin[name] = four_bits(seed, rows, columns, nested=256 * (seed % 2))
            stored |= named(parts, name)
        else:
            parts, twin[name] = eight_bits(seed, rows, columns)
            module = name.removesuffix(".weight")
            stored |= {f"{module}.{part}": value for part, value in parts.items()}
    shape = llama_config(layers=1, width=32)
    return write_model(tmp_path / "q", stored, {**shape, **ABOUT}), twin


def test_models_merge_like_their_twins(
    model: tuple[Path, Parts], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, twin = model
    assert_numbers(folder, twin)
    assert_merges_alike(folder, twin, monkeypatch)


def test_an_adapter_that_was_trained_on_four_bits(model: tuple[Path, Parts]) -> None:
    """QLoRA: the base's numbers and the update, rounded once."""
    folder, twin = model
    adapter = folder.parent / "adapter"
    adapter.mkdir()
    generator = torch.Generator().manual_seed(1)
    module = "model.layers.0.mlp.up_proj"
    a, b = torch.randn(4, 32, generator=generator), torch.randn(64, 4, generator=generator)
    key = f"base_model.model.{module}"
    factors = {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
    save_file(factors, adapter / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["up_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    recipe = folder.parent / "recipe.yaml"
    recipe.write_text("merge_method: passthrough\nmodels: [{model: ./q+./adapter}]\n")
    found = merge(recipe, folder.parent / "out")
    wanted = twin[f"{module}.weight"].double() + 2 * b.double() @ a.double()
    changed = found[f"{module}.weight"]
    assert changed.dtype == torch.bfloat16
    torch.testing.assert_close(changed.double(), wanted, rtol=2**-8, atol=1e-6)
    other = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(found[other], twin[other].bfloat16())


GOOD, _ = four_bits(0, 16, 64, nested=256)
STATE = "quant_state.bitsandbytes__nf4"
SAID = json.loads(bytes(GOOD[STATE].tolist()))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"": None}, "cannot be read without 'w.weight'"),
        ({"absmax": None}, "cannot be read without 'w.weight.absmax'"),
        ({"quant_map": None}, "cannot be read without"),
        ({"nested_absmax": None}, "cannot be read without"),
        ({STATE: None}, "its weights are quantised"),
        ({"": GOOD[""][:100].clone()}, "do not hold"),
        ({"absmax": torch.ones(16)}, "does not fit"),
        ({"absmax": GOOD["absmax"][:3].clone()}, "does not fit"),
        ({"nested_absmax": torch.ones(2)}, "does not fit"),
        ({"quant_map": torch.ones(8)}, "does not fit"),
        ({STATE: text(**{**SAID, "blocksize": -64})}, "impossible shape"),
        ({STATE: text(**{**SAID, "blocksize": 63})}, "impossible shape"),
        ({STATE: text(**{**SAID, "shape": [16, "64"]})}, "impossible shape"),
        ({STATE: text(**{**SAID, "shape": None})}, "impossible shape"),
        ({STATE: text(**{**SAID, "nested_offset": "1"})}, "impossible nested_offset"),
        ({STATE: text(**{**SAID, "quant_type": "fp4"})}, "does not say"),
        ({STATE: torch.tensor([123, 34], dtype=torch.uint8)}, "no JSON"),
        ({STATE: torch.zeros(20_000, dtype=torch.uint8)}, "20000 bytes"),
        ({STATE: None, "quant_state.bitsandbytes__nf3": GOOD[STATE]}, "'nf3' are not read"),
        ({"more": torch.zeros(3, dtype=torch.uint8)}, "belongs to no weight"),
    ],
)
def test_what_does_not_fit_is_named(
    tmp_path: Path, changed: Mapping[str, Any], message: str
) -> None:
    parts = {k: v.clone() for k, v in {**GOOD, **changed}.items() if v is not None}
    folder = write_model(tmp_path / "q", named(parts), ABOUT)
    (tmp_path / "recipe.yaml").write_text("merge_method: passthrough\nmodels: [{model: q}]\n")
    with pytest.raises(SourceError, match=message):
        merge(tmp_path / "recipe.yaml", folder.parent / "out")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weight": None}, "cannot be read without"),
        ({"weight": torch.ones(24, 40)}, "matrices of I8"),
        ({"SCB": torch.ones(23)}, "does not fit"),
        ({"SCB": None}, "its weights are quantised"),
        ({"weight_format": torch.tensor(1, dtype=torch.uint8)}, "in the layout 1"),
    ],
)
def test_int8_that_does_not_fit_is_named(
    tmp_path: Path, changed: Mapping[str, Any], message: str
) -> None:
    parts = {**eight_bits(0, 24, 40)[0], **changed}
    stored = {f"w.{k}": v.clone() for k, v in parts.items() if v is not None}
    folder = write_model(tmp_path / "q", stored, ABOUT)
    (tmp_path / "recipe.yaml").write_text("merge_method: passthrough\nmodels: [{model: q}]\n")
    with pytest.raises(SourceError, match=message):
        merge(tmp_path / "recipe.yaml", folder.parent / "out")


def test_a_file_that_is_not_here_yet_has_its_shapes_inside(tmp_path: Path) -> None:
    """As of a repository: its headers are there, its weights are fetched later."""
    from merge_cli.formats.detect import read_as_numbers

    folder = write_model(tmp_path / "q", named(GOOD))
    refs = {
        name: ref._replace(path=tmp_path / "gone" / "model.safetensors")
        for name, ref in stored_refs(folder).items()
    }
    with pytest.raises(SourceError, match="not here yet") as caught:
        read_as_numbers(refs, ABOUT, "org/model")
    assert "hf download" in caught.value.hint
