"""What is written against compressed-tensors, torch, transformers, and naive float64."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf

import merge_cli
from tests.support.encoded import WORDS, about, numbers_of, read_model, recipe, same_files, written
from tests.support.tiny import Tensors, llama_config, merge, write_model

E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
NAME = "model.layers.0.mlp.up_proj.weight"
SCHEMES: dict[str, dict[str, Any]] = {
    "int4": {"num_bits": 4, "group_size": 128, "strategy": "group", "symmetric": True},
    "nvfp4": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16,
              "scale_dtype": "torch.float8_e4m3fn", "symmetric": True},
    "fp8_row": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True},
    "fp8_tensor": {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True},
}  # fmt: skip
KINDS = {"int4": "pack-quantized", "nvfp4": "nvfp4-pack-quantized"}


def matrix(seed: int, rows: int = 40, columns: int = 256) -> torch.Tensor:
    """Values over a wide range, some of them zero."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator)
    values *= torch.exp2(torch.randint(-9, 3, (rows, 1), generator=generator))
    values[1] = 0
    values[2, :16] = 0
    return values


def model_of(folder: Path, weight: torch.Tensor, **config: Any) -> Path:
    return write_model(
        folder, {NAME: weight}, {**llama_config(layers=1), "dtype": "float32", **config}
    )


def compressed(weight: torch.Tensor, args: dict[str, Any], kind: str) -> Tensors:
    """What compressed-tensors stores: scales by its rule, in bfloat16 but those of four bits."""
    library = pytest.importorskip("compressed_tensors.quantization")
    helpers = pytest.importorskip("compressed_tensors.quantization.utils.helpers")
    compressors = pytest.importorskip("compressed_tensors.compressors.base")
    settings = library.QuantizationArgs(**args)
    groups = weight.reshape(1, -1)
    if args["strategy"] == "channel":
        groups = weight
    elif "group_size" in args:
        groups = weight.unflatten(-1, (-1, args["group_size"]))
    low, high = groups.amin(-1), groups.amax(-1)
    state = {"weight": weight}
    if kind.startswith("nvfp4"):
        # The library multiplies with a reciprocal, which rounds twice.
        largest = weight.double().abs().max()[None]
        theirs = helpers.generate_gparam(weight.min(), weight.max())
        state["weight_global_scale"] = (448 * 6 / largest).float()
        torch.testing.assert_close(state["weight_global_scale"], theirs, rtol=2**-22, atol=0)
    scales, zeros = library.utils.calculate_qparams(
        low, high, settings, state.get("weight_global_scale")
    )
    if args["strategy"] == "channel":
        scales = scales[:, None]
    state["weight_scale"] = scales if kind.startswith("nvfp4") else scales.bfloat16()
    if not args["symmetric"]:
        state["weight_zero_point"] = zeros
    scheme = library.QuantizationScheme(targets=["Linear"], weights=settings)
    compressor = compressors.BaseCompressor.get_value_from_registry(kind)
    stored: Tensors = compressor.compress(state, scheme)
    return stored


def assert_stored(found: Tensors, wanted: Tensors) -> None:
    stem = NAME.removesuffix(".weight")
    assert found.keys() == {f"{stem}.{key}" for key in wanted}
    for key, value in wanted.items():
        stored = found[f"{stem}.{key}"]
        assert (stored.dtype, stored.shape) == (value.dtype, value.shape), key
        assert torch.equal(stored.view(torch.uint8), value.view(torch.uint8)), key


@pytest.mark.parametrize("word", list(SCHEMES))
@pytest.mark.parametrize("seed", [0, 1])
def test_compressed_tensors_stores_the_same(tmp_path: Path, word: str, seed: int) -> None:
    """Codes, scales, shapes and global scales, bit for bit."""
    weight = matrix(seed)
    if word.startswith("fp8"):
        weight[1] = weight[2]  # of zeros, the library's scale is another one
    model_of(tmp_path / "a", weight)
    keys = {"method": "passthrough", "dtype": "bfloat16"}
    out = written(tmp_path, "out", word, "a", **keys)
    kind = KINDS.get(word, "float-quantized")
    found = read_model(out)
    wanted = compressed(weight, SCHEMES[word], kind)
    if word == "nvfp4":  # the library has no code for -0
        codes = found[f"{NAME}_packed"]
        for bits in (0x0F, 0xF0):
            codes[codes & bits == 0x88 & bits] &= 0xFF ^ bits
            nought = wanted["weight_packed"] & bits == 0x88 & bits
            wanted["weight_packed"][nought] &= 0xFF ^ bits
    assert_stored(found, wanted)
    library = pytest.importorskip("compressed_tensors.quantization")
    scheme = library.QuantizationConfig.model_validate(about(out)).config_groups["group_0"].weights
    assert scheme.model_dump() == library.QuantizationArgs(**SCHEMES[word]).model_dump()


@pytest.mark.parametrize("rows", [40, 36])
def test_the_asymmetric_form_if_the_source_has_it(tmp_path: Path, rows: int) -> None:
    """Groups of 32 with zero points, as the base has them; the library stores the same."""
    args = {"num_bits": 4, "group_size": 32, "strategy": "group", "symmetric": False}
    base, other = matrix(0, rows), matrix(1, rows)
    for weight in (base, other):  # the library's zero point of a group of zeros is undefined
        weight += 0.1
    parts = compressed(base, args, "pack-quantized")
    words = {"quant_method": "compressed-tensors", "format": "pack-quantized",
             "config_groups": {"group_0": {"targets": ["Linear"], "weights": args}}}  # fmt: skip
    stem = NAME.removesuffix(".weight")
    stored = {f"{stem}.{key}": value for key, value in parts.items()}
    write_model(tmp_path / "q", stored, {**llama_config(layers=1), "quantization_config": words})
    model_of(tmp_path / "b", other)
    twin = numbers_of(tmp_path / "q")[NAME]
    keys = {"dtype": "bfloat16"}
    for word in ("same", "int4"):
        out = written(tmp_path, word, word, "q", "b", **keys)
        assert_stored(read_model(out), compressed((twin + other) / 2, args, "pack-quantized"))
    assert about(tmp_path / "same") == words
    assert about(tmp_path / "int4")["config_groups"]["group_0"]["weights"]["group_size"] == 32
    assert same_files(written(tmp_path, "again", "same", "q", "q"), tmp_path / "q")


def mx_oracle(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """OCP MX 1.0, section 6.3, of groups of 32: bytes of codes and of exponents, in float64."""
    groups = values.astype(np.float64).reshape(-1, 32)
    codes = np.zeros((len(groups), 16), np.uint8)
    exponents = np.zeros(len(groups), np.uint8)
    for g, group in enumerate(groups):
        largest = abs(group).max()
        # The largest power of two in the group, over the largest one that E2M1 has: 4.
        shared = max(math.floor(math.log2(largest)) - 2, -127) if largest else -127
        exponents[g] = shared + 127
        for i, value in enumerate(group):
            distance = [abs(abs(value) / 2.0**shared - number) for number in E2M1]
            nearest = [n for n in range(8) if distance[n] == min(distance)]
            code = next((n for n in nearest if n % 2 == 0), nearest[0])
            codes[g, i // 2] |= (code | (8 if np.signbit(value) else 0)) << 4 * (i % 2)
    return codes, exponents


def test_the_shared_exponent_is_the_specifications(tmp_path: Path) -> None:
    weight = matrix(3)
    weight[3, 0], weight[3, 1:32] = 7.9, 0.3  # beyond 6 in its group: becomes 6
    model_of(tmp_path / "a", weight)
    found = read_model(written(tmp_path, "out", "mxfp4", "a", method="passthrough"))
    codes, exponents = mx_oracle(weight.numpy())
    np.testing.assert_array_equal(found[f"{NAME}_packed"].reshape(-1, 16).numpy(), codes)
    np.testing.assert_array_equal(found[f"{NAME}_scale"].reshape(-1).numpy(), exponents)


@pytest.mark.parametrize("word", ["fp8_row", "fp8_tensor"])
def test_torch_converts_the_same(tmp_path: Path, word: str) -> None:
    """Scales are the largest magnitude over 448; codes are torch's own conversion."""
    weight = matrix(4)
    model_of(tmp_path / "a", weight)
    found = read_model(written(tmp_path, "out", word, "a", method="passthrough"))
    largest = weight.abs().amax(-1, keepdim=True) if word == "fp8_row" else weight.abs().max()[None]
    scale = torch.where(largest > 0, largest / 448, torch.ones_like(largest))
    assert torch.equal(found[f"{NAME}_scale"], scale)
    wanted = (weight / scale).to(torch.float8_e4m3fn)
    assert torch.equal(found[NAME].view(torch.uint8), wanted.view(torch.uint8))


SIZES = {
    "vocab_size": 64, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32,
}  # fmt: skip
PROMPT = torch.tensor([[1, 2, 3]])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dequantize", [False, True])
@pytest.mark.parametrize("word", [word for word in WORDS if word != "fp8"])
def test_transformers_loads_it_and_generates(tmp_path: Path, word: str, dequantize: bool) -> None:
    """Compressed, or dequantised while loading: the weights are the numbers that are read here."""
    pytest.importorskip("compressed_tensors")
    torch.manual_seed(0)
    config = hf.AutoConfig.for_model("llama", **SIZES)
    whole = hf.AutoModelForCausalLM.from_config(config).bfloat16()
    whole.save_pretrained(tmp_path / "a")
    out = written(tmp_path, "out", word, "a", method="passthrough")
    options = {"quantization_config": hf.CompressedTensorsConfig(dequantize=True)}
    loaded, info = hf.AutoModelForCausalLM.from_pretrained(
        out, output_loading_info=True, dtype=torch.bfloat16, **(options if dequantize else {})
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        logits, wanted = loaded(PROMPT).logits.float(), whole(PROMPT).logits.float()
    assert (logits - wanted).norm() / wanted.norm() < (0.1 if word.startswith("fp8") else 0.25)
    tokens = loaded.generate(PROMPT, max_new_tokens=4, do_sample=False)
    assert tokens.shape == (1, 7)
    state, numbers = loaded.state_dict(), numbers_of(out)
    checked = [name for name in numbers if "_proj" in name and name in state]
    assert len(checked) == 14  # decompressed by the first call, too
    for name in checked:
        torch.testing.assert_close(
            state[name].float(), numbers[name].bfloat16().float(), rtol=2**-7, atol=0
        )


def gpt_oss(folder: Path) -> Any:
    """A tiny gpt-oss in bfloat16."""
    torch.manual_seed(0)
    model = hf.GptOssForCausalLM(hf.GptOssConfig(
        vocab_size=48, hidden_size=64, intermediate_size=32, num_hidden_layers=2, head_dim=8,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2,
    )).bfloat16()  # fmt: skip
    config = {**json.loads(model.config.to_json_string()), "dtype": "bfloat16"}
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    return model, tensors, write_model(folder, tensors, config)


@pytest.mark.filterwarnings("ignore")
def test_gpt_oss(tmp_path: Path) -> None:
    """Experts in their layout: what transformers dequantises, and the model generates."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    _, tensors, _ = gpt_oss(tmp_path / "a")
    out = written(tmp_path, "out", "mxfp4", "a", method="passthrough")
    stored, numbers = read_model(out), numbers_of(out)
    stacks = [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]
    assert len(stacks) == 4
    for name in stacks:
        blocks, scales = stored[f"{name}_blocks"], stored[f"{name}_scales"]
        turned = tensors[name].float().transpose(1, 2).contiguous()  # experts, columns, inputs
        codes, exponents = mx_oracle(turned.numpy())
        np.testing.assert_array_equal(blocks.reshape(-1, 16).numpy(), codes)
        np.testing.assert_array_equal(scales.reshape(-1).numpy(), exponents)
        assert blocks.nbytes + scales.nbytes == tensors[name].numel() * 17 / 32
        theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
        assert torch.equal(theirs, numbers[name])
    for name in set(tensors) - set(stacks):
        assert torch.equal(stored[name], tensors[name])
    words = about(out)
    assert words["quant_method"] == "mxfp4"
    assert "model.layers.0.self_attn.q_proj" in words["modules_to_not_convert"]
    loaded, info = hf.AutoModelForCausalLM.from_pretrained(
        out, output_loading_info=True, dtype=torch.bfloat16,
        quantization_config=hf.Mxfp4Config(dequantize=True),
    )  # fmt: skip
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name in stacks:
        assert torch.equal(loaded.state_dict()[name].float(), numbers[name])
    assert loaded.generate(PROMPT, max_new_tokens=4, do_sample=False).shape == (1, 7)


def test_gpt_oss_keeps_the_blocks_that_no_source_changed(tmp_path: Path) -> None:
    """Blocks that another program has written with other exponents stay as they are."""
    _, tensors, _ = gpt_oss(tmp_path / "a")
    base = written(tmp_path, "q", "mxfp4", "a", method="passthrough")
    stored = read_model(base)
    name = "model.layers.1.mlp.experts.down_proj"
    # The same numbers as half the codes and twice the scale: no encoder here would write that.
    stored[f"{name}_blocks"][0, 0, 0] = 0x12
    stored[f"{name}_scales"][0, 0, 0] = 120
    write_model(tmp_path / "q", stored, json.loads((base / "config.json").read_text()))
    changed = numbers_of(base)
    changed[name][2, 17, 9] += 0.5  # one number of one expert
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    write_model(tmp_path / "tuned", changed, config)
    path = recipe(tmp_path, "same", "task_arithmetic", "tuned", base_model="q",
                  parameters={"weight": 1.0})  # fmt: skip
    found = merge(path, tmp_path / "out", threads=2)
    assert found.keys() == stored.keys()
    for key, value in stored.items():
        differs = (found[key] != value).nonzero()
        if key in (f"{name}_blocks", f"{name}_scales"):
            assert len(differs)
            assert (differs[:, :3] == torch.tensor([2, 9, 0])).all(), key
        else:
            assert not len(differs), key
    assert about(tmp_path / "out") == about(base)
    twin = changed[name][2, :32, 9]
    assert (numbers_of(tmp_path / "out")[name][2, :32, 9] - twin).abs().max() <= 0.125


@pytest.mark.parametrize("word", ["mxfp4", "nvfp4"])
def test_what_is_written_can_be_evaluated(tmp_path: Path, zoo: Path, word: str) -> None:
    """In float32, as every model on a CPU: the numbers of the decoded model, nearly, since
    compressed-tensors rounds scales of scales to bfloat16.
    """
    pytest.importorskip("compressed_tensors")
    values = {}
    models = [{"model": str(zoo / "math")}, {"model": str(zoo / "code")}]
    for name, about_it in {
        "coded": {"models": models, "out_dtype": word},
        "decoded": {"models": [{"model": "coded"}], "dtype": "float32"},
    }.items():
        path = tmp_path / f"{name}.yaml"
        path.write_text(json.dumps({"merge_method": "linear", **about_it}))
        merge(path, tmp_path / name)
        result = merge_cli.evaluate(
            tmp_path / name, [zoo / "data" / "math.val.jsonl"], limit=5, device="cpu"
        )
        assert result.dtype.startswith("float32")
        values[name] = result["math"]["loss"].value
    assert values["coded"] == pytest.approx(values["decoded"], rel=2e-3)
