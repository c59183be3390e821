"""MXFP4 against the table of the OCP specification, and against transformers' own reading."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from merge_cli.errors import CorruptFileError
from merge_cli.formats import stored_matrix
from tests.support.quantised import assert_merges_alike, assert_numbers, opened
from tests.support.tiny import merge, write_model

# OCP MX 1.0, table 5 (E2M1): sign, two bits of exponent, one of fraction.
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
ABOUT = {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}}


def oracle(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """[experts, columns, groups, 16] -> [experts, 32 groups, columns], one number at a time."""
    experts, columns, groups, _ = blocks.shape
    out = torch.empty(experts, groups * 32, columns, dtype=torch.float64)
    for e in range(experts):
        for j in range(columns):
            for i in range(groups * 32):
                byte = int(blocks[e, j, i // 32, i % 32 // 2])
                code = byte >> 4 if i % 2 else byte & 15
                exponent = int(scales[e, j, i // 32]) - 127
                out[e, i, j] = E2M1[code] * 2.0**exponent
    return out


def random_stack(
    seed: int, experts: int, columns: int, groups: int
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (experts, columns, groups)
    blocks = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(118, 125, shape, generator=generator, dtype=torch.uint8)
    return blocks, scales


@pytest.fixture
def model(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A tiny gpt-oss whose experts are in MXFP4, and its twin in float32."""
    torch.manual_seed(0)
    whole = hf.GptOssForCausalLM(hf.GptOssConfig(
        vocab_size=48, hidden_size=64, intermediate_size=32, num_hidden_layers=2, head_dim=8,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2,
    ))  # fmt: skip
    config = {**json.loads(whole.config.to_json_string()), **ABOUT, "dtype": "bfloat16"}
    stored, twin = {}, {}
    for seed, (name, value) in enumerate(whole.state_dict().items()):
        if not name.endswith(("gate_up_proj", "down_proj")):
            stored[name] = value.bfloat16()
            twin[name] = stored[name].float()
            continue
        experts, rows, columns = value.shape
        blocks, scales = random_stack(seed, experts, columns, rows // 32)
        stored[f"{name}_blocks"], stored[f"{name}_scales"] = blocks, scales
        twin[name] = oracle(blocks, scales).float()
    return write_model(tmp_path / "q", stored, config), twin


def test_numbers_and_merges_are_the_twins(
    model: tuple[Path, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, twin = model
    assert_numbers(folder, twin)
    assert_merges_alike(folder, twin, monkeypatch)


def test_transformers_reads_the_same_and_what_is_written(
    model: tuple[Path, dict[str, torch.Tensor]],
) -> None:
    folder, twin = model
    settings = hf.Mxfp4Config(dequantize=True)
    loaded = hf.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=settings, dtype=torch.bfloat16
    )
    state = loaded.state_dict()
    for name, value in twin.items():
        assert torch.equal(state[name].float(), value), name
    prompt = torch.tensor([[1, 2, 3]])
    wanted = loaded.generate(prompt, max_new_tokens=4, do_sample=False)
    recipe = folder.parent / "recipe.yaml"
    recipe.write_text("merge_method: passthrough\nmodels: [{model: q}]\n")
    merge(recipe, folder.parent / "out")
    merged = hf.AutoModelForCausalLM.from_pretrained(folder.parent / "out", dtype=torch.bfloat16)
    assert torch.equal(merged.generate(prompt, max_new_tokens=4, do_sample=False), wanted)


@pytest.mark.parametrize("strip", [1, 7, 1000, 10**7])
def test_strips_of_any_width(tmp_path: Path, strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide lines are cut by pieces, narrow ones whole."""
    monkeypatch.setattr(stored_matrix, "STRIP_BYTES", strip)
    monkeypatch.setattr(stored_matrix, "_SLAB_BYTES", 100)
    blocks, scales = random_stack(strip, 3, 5, 20)
    twin = {"w": oracle(blocks, scales).float()}
    assert_numbers(
        write_model(tmp_path / "q", {"w_blocks": blocks, "w_scales": scales}, ABOUT), twin
    )


def test_another_model_at_the_same_path_is_read_anew(tmp_path: Path) -> None:
    for seed in (1, 2):
        blocks, scales = random_stack(seed, 2, 6, 3)
        folder = write_model(tmp_path / "q", {"w_blocks": blocks, "w_scales": scales}, ABOUT)
        assert_numbers(folder, {"w": oracle(blocks, scales).float()})


def test_an_exponent_that_is_no_number_is_none(tmp_path: Path) -> None:
    """OCP MX 1.0, section 5.4.1: E8M0 has one NaN and no infinity."""
    blocks, scales = random_stack(0, 1, 2, 1)
    scales[0, 1, 0] = 255
    wanted = oracle(blocks, scales).float()
    wanted[:, :, 1] = float("nan")
    folder = write_model(tmp_path / "q", {"w_blocks": blocks, "w_scales": scales}, ABOUT)
    assert_numbers(folder, {"w": wanted})


BLOCKS, SCALES = random_stack(0, 2, 4, 3)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"w_blocks": BLOCKS}, "cannot be read without 'w_scales'"),
        ({"w_scales": SCALES}, "belongs to no weight"),
        ({"w_blocks": BLOCKS, "w_scales": SCALES[:, :, :2].contiguous()}, "does not fit"),
        ({"w_blocks": BLOCKS, "w_scales": SCALES.float()}, "does not fit"),
        ({"w_blocks": BLOCKS[..., :8].contiguous(), "w_scales": SCALES}, "experts in MXFP4 are"),
        ({"w_blocks": BLOCKS[0].contiguous(), "w_scales": SCALES[0]}, "experts in MXFP4 are"),
        ({"w_blocks": BLOCKS, "w_scales": SCALES, "w": torch.ones(2)}, "a second time"),
    ],
)
def test_what_does_not_fit_is_named(
    tmp_path: Path, tensors: Mapping[str, Any], message: str
) -> None:
    folder = write_model(tmp_path / "q", {k: v.clone() for k, v in tensors.items()}, ABOUT)
    with pytest.raises(CorruptFileError, match=message) as caught:
        opened(folder)
    assert caught.value.file == "model.safetensors"
    assert caught.value.tensor.startswith("w")
