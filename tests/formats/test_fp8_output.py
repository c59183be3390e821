"""`out_dtype: fp8` against float64, torch's own conversion, and transformers as the reader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import merge_cli
from merge_cli.engine import memory
from merge_cli.errors import NonFiniteError, RecipeError
from merge_cli.formats.encoding import Tiles
from merge_cli.formats.fp8_encoding import Fp8Encoding
from merge_cli.kernels import compiled
from merge_cli.options import MergeOptions
from merge_cli.planning import chunks as units
from merge_cli.planning.planner import load_recipe, make_plan
from tests.support.tiny import llama_config, llama_tensors, read_model, write_model

OPTIONS = MergeOptions(device="cpu", threads=1)
CODES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()
LAYER = "model.layers.0."


def oracle(matrix: np.ndarray, block: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales, one block and one element after another: the nearest of all 256 numbers."""
    rows, columns = matrix.shape
    codes = np.empty(matrix.shape, np.uint8)
    scales = np.empty((-(-rows // block), -(-columns // block)), np.float32)
    numbers = CODES[:127]  # the positive ones, ascending
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            at = np.s_[i * block : (i + 1) * block, j * block : (j + 1) * block]
            largest = np.float32(np.abs(matrix[at]).max())
            scales[i, j] = largest / np.float32(448) if largest else 1
            quotient = (matrix[at] / scales[i, j]).astype(np.float64)
            distance = np.abs(np.abs(quotient)[..., None] - numbers)
            nearest = distance.argmin(-1)
            tie = distance[..., 1:] == distance[..., :-1]
            tie &= distance[..., 1:] == distance.min(-1, keepdims=True)
            odd = nearest % 2 == 1
            nearest += tie.any(-1) & odd  # of two, the lower was found: the even one is wanted
            codes[at] = nearest | (np.signbit(quotient) << 7)
    return codes, scales


def written(matrix: np.ndarray, wide: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of one row of blocks."""
    codes = np.empty(matrix.size, np.uint8)
    scales = np.empty(-(-matrix.shape[1] // wide), np.float32)
    with np.errstate(all="ignore"):
        stored = [codes, scales.view(np.uint8)]
        Fp8Encoding(128, wide).encode(Tiles(matrix.reshape(-1), matrix.shape), stored)
    return codes.reshape(matrix.shape), scales


def test_codes_are_the_nearest(tmp_path: Path) -> None:
    matrix = np.random.default_rng(0).normal(size=(128, 300)).astype(np.float32)
    matrix[:, 128:256] *= 1e-4
    matrix[:, 256:] = 0
    matrix[0, :4] = [0.0, -0.0, 1e-9, -1e-9]
    codes, scales = written(matrix, 128)
    wanted = oracle(matrix)
    np.testing.assert_array_equal(scales, wanted[1][0])
    np.testing.assert_array_equal(codes, wanted[0])


finite = st.floats(width=32, allow_nan=True, allow_infinity=True)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the first draw
@given(arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 9)), elements=finite))
def test_compiled_is_plain_and_torch(matrix: np.ndarray) -> None:
    codes, scales = written(matrix, 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "available", lambda: "switched off")
        again, same = written(matrix, 4)
    np.testing.assert_array_equal(codes, again)
    np.testing.assert_array_equal(scales, same)
    with np.errstate(all="ignore"):
        quotient = np.clip(matrix / np.repeat(scales, 4)[: matrix.shape[1]], -448, 448)
    theirs = torch.from_numpy(quotient).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    known = np.isfinite(matrix)
    np.testing.assert_array_equal(codes[known], theirs[known])
    assert (codes[~known] == 0x7F).all()


def family(folder: Path, **options: Any) -> list[dict[str, torch.Tensor]]:
    """Two Llamas whose layers are 128 and 256 wide."""
    models = []
    for seed, name in enumerate(("a", "b")):
        generator = torch.Generator().manual_seed(seed)
        tensors = llama_tensors(generator, layers=2, width=128, **options)
        models.append({key: value.bfloat16() for key, value in tensors.items()})
        config = llama_config(layers=2, width=128, **options)
        write_model(folder / name, models[-1], config)
    return models


def recipe(folder: Path, method: str = "soup", **keys: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({
        "merge_method": method, "models": [{"model": "a"}, {"model": "b"}], "out_dtype": "fp8",
        **keys,
    }))  # fmt: skip
    return path


def numbers(model: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    scale = model[f"{name}_scale_inv"].double()
    wide = scale.repeat_interleave(128, -2).repeat_interleave(128, -1)
    shape = model[name].shape
    return model[name].double() * wide[..., : shape[-2], : shape[-1]]


def test_a_soup_in_fp8(tmp_path: Path) -> None:
    first, second = family(tmp_path)
    found = read_model(merge_cli.merge(recipe(tmp_path), tmp_path / "out", options=OPTIONS).path)
    scaled = {name for name in found if found[name].dtype == torch.float8_e4m3fn}
    assert scaled == {name for name in first if "_proj" in name}
    for name, value in first.items():
        mean = (value.float() + second[name].float()) / 2
        if name not in scaled:
            assert torch.equal(found[name], mean.bfloat16())
            continue
        codes, scales = oracle(mean.numpy())
        assert torch.equal(found[f"{name}_scale_inv"], torch.from_numpy(scales))
        assert torch.equal(found[name].view(torch.uint8), torch.from_numpy(codes))
    about = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert about["quant_method"] == "fp8"
    assert about["weight_block_size"] == [128, 128]
    assert about["modules_to_not_convert"] == ["lm_head", "model.embed_tokens"]


def test_the_bytes_do_not_depend_on_blocks_threads_or_arithmetic(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family(tmp_path)
    path = recipe(tmp_path, "ties", base_model="a", models=[{"model": "b"}])
    file = merge_cli.merge(path, tmp_path / "one", options=OPTIONS).path / "model.safetensors"
    wanted = file.read_bytes()
    monkeypatch.setattr(units, "UNIT_BYTES", 1)
    for module in (units, memory):
        monkeypatch.setattr(module, "BLOCK_MULTIPLE", 192)
    monkeypatch.setattr(memory, "_HOST_BLOCK", 192 * 3)  # in the middle of rows and of blocks
    several = MergeOptions(device="cpu", threads=3)
    file = merge_cli.merge(path, tmp_path / "two", options=several).path / "model.safetensors"
    assert file.read_bytes() == wanted
    monkeypatch.setattr(compiled, "available", lambda: "switched off")
    file = merge_cli.merge(path, tmp_path / "three", options=OPTIONS).path / "model.safetensors"
    assert file.read_bytes() == wanted


def test_it_can_be_merged_again_and_stays(tmp_path: Path) -> None:
    """What is in fp8 is read as numbers; the reference's own choice of matrices is kept."""
    family(tmp_path)
    path = recipe(tmp_path)
    first = read_model(merge_cli.merge(path, tmp_path / "c", options=OPTIONS).path)
    again = recipe(tmp_path, "passthrough", models=[{"model": "c"}])
    second = read_model(merge_cli.merge(again, tmp_path / "d", options=OPTIONS).path)
    assert first.keys() == second.keys()
    for name, value in first.items():
        if value.dtype == torch.float8_e4m3fn:
            assert torch.equal(value.view(torch.uint8), second[name].view(torch.uint8))
            torch.testing.assert_close(
                numbers(first, name), numbers(second, name), rtol=1e-6, atol=0
            )
    full = recipe(tmp_path, "passthrough", models=[{"model": "c"}], out_dtype="float32")
    third = read_model(merge_cli.merge(full, tmp_path / "e", options=OPTIONS).path)
    name = f"{LAYER}mlp.up_proj.weight"
    torch.testing.assert_close(third[name].double(), numbers(first, name), rtol=1e-7, atol=0)
    assert "quantization_config" not in json.loads((tmp_path / "e" / "config.json").read_text())


def test_partial_blocks_where_the_reference_has_them(tmp_path: Path) -> None:
    first, _ = family(tmp_path)
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(200, 128, generator=generator).to(torch.float8_e4m3fn)
    name = f"{LAYER}mlp.up_proj.weight"
    tensors = {
        **first,
        name: weight,
        f"{name}_scale_inv": torch.rand(2, 1, generator=generator) + 0.1,
    }
    quantised = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config = {**llama_config(layers=2, width=128), "quantization_config": quantised}
    write_model(tmp_path / "q", tensors, config)
    path = recipe(tmp_path, models=[{"model": "q"}, {"model": "q", "parameters": {"weight": 3}}])
    found = read_model(merge_cli.merge(path, tmp_path / "out", options=OPTIONS).path)
    assert [key for key in found if found[key].dtype == torch.float8_e4m3fn] == [name]
    assert found[f"{name}_scale_inv"].shape == (2, 1)
    # A soup of a model with itself: the numbers are the same, rounded again by another scale.
    wanted = numbers(tensors, name)
    limit = np.repeat(found[f"{name}_scale_inv"].double().numpy(), 128, 0)[:200] * 16 * (1 + 1e-6)
    assert ((numbers(found, name) - wanted).abs().numpy() <= limit).all()


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe", "mixtral"])
def test_transformers_reads_it(tmp_path: Path, kind: str) -> None:
    """Dequantised while loading, as it is where there is no GPU for fp8."""
    import transformers as hf

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32,
    }  # fmt: skip
    experts = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
        "num_local_experts": 4,
    }
    config = hf.AutoConfig.for_model(kind, **sizes, **(experts if kind != "llama" else {}))
    model = hf.AutoModelForCausalLM.from_config(config).bfloat16()
    model.save_pretrained(tmp_path / "a")
    path = recipe(tmp_path, "passthrough", models=[{"model": "a"}])
    out = merge_cli.merge(path, tmp_path / "out", options=OPTIONS).path
    stored = read_model(out)
    loaded, info = hf.AutoModelForCausalLM.from_pretrained(
        out, output_loading_info=True, dtype=torch.bfloat16
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    parameters = dict(loaded.named_parameters())
    plain = [name for name in stored if name in parameters and f"{name}_scale_inv" in stored]
    assert len(plain) >= 8
    for name in plain:
        assert torch.equal(parameters[name], numbers(stored, name).bfloat16())
    if kind != "llama":
        assert any(".experts." in name and name.endswith("_scale_inv") for name in stored)
        assert not any("gate.weight_scale" in name for name in stored)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        difference = (loaded(ids).logits - model(ids).logits).float().norm()
        assert difference / model(ids).logits.float().norm() < 0.1


def refused(path: Path, *said: str) -> None:
    with pytest.raises(RecipeError) as error:
        make_plan(load_recipe(path))
    for part in said:
        assert part in str(error.value)


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    tensors = llama_tensors(torch.Generator().manual_seed(0))
    for name in ("a", "b"):
        write_model(tmp_path / name, tensors, llama_config())
    refused(recipe(tmp_path), "out_dtype", "multiples of 128")
    refused(recipe(tmp_path, dtype="fp8"), "Write `out_dtype: fp8`")
    refused(recipe(tmp_path, out_dtype="fp9"), "Did you mean 'fp8'?")
    goal = [{"task": "loss", "data": "text.txt"}]
    (tmp_path / "text.txt").write_text("text")
    refused(recipe(tmp_path, "greedy_soup", objective=goal), "Search in bfloat16")
    for name in ("a", "b"):
        write_model(tmp_path / name, tensors, {**llama_config(), "model_type": "gpt2"})
    refused(recipe(tmp_path), "gpt2 stores its layers [in, out]")
    path = recipe(tmp_path, name="half")
    last = {"merge_method": "soup", "models": [{"model": "half"}, {"model": "b"}]}
    path.write_text(path.read_text() + "---\n" + yaml.safe_dump(last))
    refused(path, "what another document merges is kept in full")


def test_nan_is_named_or_written_as_nan(tmp_path: Path) -> None:
    first, _ = family(tmp_path)
    name = f"{LAYER}mlp.up_proj.weight"
    first[name][3, 5] = float("nan")
    write_model(tmp_path / "a", first, llama_config(layers=2, width=128))
    path = recipe(tmp_path)
    with pytest.raises(NonFiniteError):
        merge_cli.merge(path, tmp_path / "out", options=OPTIONS)
    allowed = MergeOptions(device="cpu", threads=1, allow_non_finite=True)
    found = read_model(merge_cli.merge(path, tmp_path / "nan", options=allowed).path)
    assert found[name].double().isnan().sum() == 1
    assert found[name].double()[3, 5].isnan()
