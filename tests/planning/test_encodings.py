"""Which tensors are written in codes, in whose form, and what is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from merge_cli.errors import RecipeError
from merge_cli.planning.plan import Plan
from merge_cli.planning.planner import load_recipe, make_plan
from tests.support.encoded import (
    about,
    family,
    numbers_of,
    read_model,
    recipe,
    same_files,
    written,
)
from tests.support.tiny import llama_config, merge, write_model

UP = "model.layers.0.mlp.up_proj"


def planned(path: Path) -> Plan:
    return make_plan(load_recipe(path))


def refused(path: Path, *said: str) -> None:
    with pytest.raises(RecipeError) as error:
        planned(path)
    for part in ("out_dtype", "recipe.yaml:", *said):
        assert part in str(error.value)


def quantised(
    root: Path, parts: Mapping[str, torch.Tensor], words: Any, name: str = "q"
) -> dict[str, torch.Tensor]:
    """A model whose `up_proj` of the first layer is stored as these parts."""
    (tensors,) = family(root, "a")
    stored = {key: value for key, value in tensors.items() if key != f"{UP}.weight"}
    stored |= {f"{UP}.{key}": value for key, value in parts.items()}
    config = llama_config(layers=2, width=128)
    if words is not None:
        config["quantization_config"] = words
    write_model(root / name, stored, config)
    return stored


E4M3 = torch.randn(256, 128, generator=torch.Generator().manual_seed(5)).to(torch.float8_e4m3fn)
E5M2 = E4M3.float().to(torch.float8_e5m2)
ONE = torch.ones(())
CHANNEL = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": CHANNEL}},
}
NVFP4 = {
    "weight": torch.randint(0, 256, (256, 64), dtype=torch.uint8),
    "weight_scale": (torch.rand(256, 8) * 400 + 1).to(torch.float8_e4m3fn),
    "weight_scale_2": torch.tensor(1 / 5000),
}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4"}

# Forms that are written as they are: what is stored, and what config.json says.
FORMS: dict[str, tuple[dict[str, torch.Tensor], Any]] = {
    "FBGEMM, rows": (
        {"weight": E4M3, "weight_scale": torch.rand(256, 1) + 0.1},
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0},
    ),
    "compressed-tensors, rows": (
        {"weight": E4M3, "weight_scale": (torch.rand(256, 1) + 0.1).bfloat16()},
        COMPRESSED,
    ),
    "ModelOpt, fp8 of the tensor": (
        {"weight": E4M3, "weight_scale": torch.tensor(0.25)},
        {"quant_method": "modelopt", "quant_algo": "FP8"},
    ),
    "partial blocks of 100": (
        {"weight": E4M3, "weight_scale_inv": torch.rand(3, 2) + 0.1},
        {"quant_method": "fp8", "weight_block_size": [100, 100]},
    ),
    "powers of two": (
        {"weight": E4M3, "weight_scale_inv": torch.exp2(torch.randint(-3, 3, (2, 1)).float())},
        {"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"},
    ),
    "exponents": (
        {"weight": E4M3,
         "weight_scale_inv": torch.exp2(torch.randint(-3, 3, (2, 1)).float())
         .to(torch.float8_e8m0fnu)},
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
    ),
    "without scales": ({"weight": E4M3}, None),
    "ComfyUI": ({"weight": E4M3, "scale_weight": torch.tensor([0.5])}, None),
    "E5M2 without scales": ({"weight": E5M2}, None),
    "E5M2 of ComfyUI": ({"weight": E5M2, "scale_weight": torch.tensor(0.001)}, None),
    "E5M2 by blocks": (
        {"weight": E5M2, "weight_scale_inv": torch.rand(2, 1) / 100 + 0.001},
        {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e5m2"},
    ),
    "NVFP4 of ModelOpt": (NVFP4, MODELOPT),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_same_keeps_the_form(tmp_path: Path, form: str) -> None:
    """A merge has the same tensors in the same dtypes, near the exact average; itself is itself."""
    stored = quantised(tmp_path, *FORMS[form])
    out = written(tmp_path, "out", "same", "q", "a")
    found = read_model(out)
    assert {k: (v.dtype, v.shape) for k, v in found.items()} == {
        k: (v.dtype, v.shape) for k, v in stored.items()
    }
    assert about(out) == about(tmp_path / "q")
    exact = (numbers_of(tmp_path / "q")[f"{UP}.weight"] + stored_twin(tmp_path)) / 2
    difference = (numbers_of(out)[f"{UP}.weight"] - exact).abs()
    # Half a step, and a rounded scale.
    coarse = 1 / 6 if "NVFP4" in form else 1 / 8 if "E5M2" in form else 1 / 16
    largest = exact.abs().max() if "NVFP4" in form else exact.abs()
    assert (difference <= largest * coarse * 1.02 + exact.abs().max() * 2**-9).all()
    if form == "powers of two":
        assert (torch.frexp(found[f"{UP}.weight_scale_inv"]).mantissa == 0.5).all()
    for models in (("q",), ("q", "q")):
        method = "passthrough" if len(models) == 1 else "soup"
        again = written(tmp_path, f"again-{method}", "same", *models, method=method)
        assert same_files(again, tmp_path / "q")


def stored_twin(root: Path) -> torch.Tensor:
    return read_model(root / "a")[f"{UP}.weight"].float()


def test_a_single_file_of_comfyui_comes_out_as_it_was(tmp_path: Path) -> None:
    """Scaled fp8 with its mark, without a config: read from a file, written as one."""
    from safetensors.torch import load_file, save_file

    name = "diffusion_model.blocks.0.attn.weight"
    stored = {
        name: E4M3,
        name.replace("weight", "scale_weight"): torch.tensor(0.5),
        "diffusion_model.norm.weight": torch.ones(8, dtype=torch.bfloat16),
        "scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn),
    }
    save_file(stored, tmp_path / "a.safetensors")
    tuned = {**stored, name: (E4M3.float() * 0.5).bfloat16()}
    plain = {key: tuned[key] for key in (name, "diffusion_model.norm.weight")}
    plain[name] = plain[name] + 0.25
    save_file(plain, tmp_path / "b.safetensors")
    models = ("./a.safetensors", "./b.safetensors")
    merge(recipe(tmp_path, "same", "passthrough", models[0]), tmp_path / "copy", threads=1)
    copied = load_file(tmp_path / "copy" / "a.safetensors")
    assert copied.keys() == stored.keys()
    for key, value in stored.items():
        raw, wanted = (each.flatten().view(torch.uint8) for each in (copied[key], value))
        assert torch.equal(raw, wanted), key
    merge(recipe(tmp_path, "same", "soup", *models), tmp_path / "out", threads=1)
    found = load_file(tmp_path / "out" / "a.safetensors")
    assert {k: (v.dtype, v.shape) for k, v in found.items()} == {
        k: (v.dtype, v.shape) for k, v in stored.items()
    }
    numbers = found[name].float() * found[name.replace("weight", "scale_weight")]
    exact = (E4M3.float() * 0.5 + plain[name].float()) / 2
    assert ((numbers - exact).abs() <= exact.abs() / 16 * 1.01 + 1e-3).all()


UNWRITTEN: dict[str, tuple[dict[str, torch.Tensor], Any, str]] = {
    "columns": (
        {"weight": E4M3, "weight_scale": torch.rand(1, 128) + 0.1},
        {"quant_method": "fbgemm_fp8"},
        "scales of shape [1, 128]",
    ),
    "int8": (
        {"weight": torch.ones(256, 128, dtype=torch.int8), "weight_scale": torch.ones(256, 1)},
        {"quant_method": "compressed-tensors", "format": "int-quantized"},
        "integers of 8 bits are not written",
    ),
    "bitsandbytes": (
        {"weight": torch.ones(256, 128, dtype=torch.int8), "SCB": torch.ones(256)},
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        "int8 by rows, over 127 is not written",
    ),
}


@pytest.mark.parametrize("form", UNWRITTEN)
def test_what_is_read_alone_is_refused_by_name_and_copied(tmp_path: Path, form: str) -> None:
    parts, words, said = UNWRITTEN[form]
    quantised(tmp_path, parts, words)
    refused(recipe(tmp_path, "same", "soup", "q", "a"), said, f"{UP}.weight")
    out = written(tmp_path, "out", "same", "q", method="passthrough")
    assert same_files(out, tmp_path / "q")


def test_scales_of_activations(tmp_path: Path) -> None:
    """Copied with what they are of; of merged weights they would have to be measured again."""
    quantised(tmp_path, {**NVFP4, "input_scale": ONE}, MODELOPT)
    out = written(tmp_path, "out", "same", "q", method="passthrough")
    assert same_files(out, tmp_path / "q")
    refused(recipe(tmp_path, "same", "soup", "q", "a"), "scales of activations", "input_scale")
    found = read_model(written(tmp_path, "weights", "nvfp4", "q", "a"))
    assert f"{UP}.weight_global_scale" in found
    assert f"{UP}.input_scale" not in found


def test_the_word_takes_the_models_own_form(tmp_path: Path) -> None:
    """Without scales of activations, ModelOpt's names; every other layer stays as it is."""
    quantised(tmp_path, NVFP4, MODELOPT)
    found = read_model(written(tmp_path, "out", "nvfp4", "q", "a"))
    assert found[f"{UP}.weight"].dtype == torch.uint8
    assert found[f"{UP}.weight_scale_2"].shape == ()
    assert sum(value.dtype == torch.uint8 for value in found.values()) == 1
    words = about(tmp_path / "out")
    assert words["quant_algo"] == "NVFP4"
    assert "model.layers.0.mlp.gate_proj" in words["ignore"]
    other = read_model(written(tmp_path, "int4", "int4", "q", "a"))
    assert f"{UP}.weight_packed" in other


def test_several_forms_in_one_model(tmp_path: Path) -> None:
    """Groups of 128 and of 32: two schemes, each of the modules that it names."""
    args = {"num_bits": 4, "type": "int", "strategy": "group", "symmetric": True}
    family(tmp_path)
    base = written(tmp_path, "q", "int4", "a", method="passthrough")
    stored, config = read_model(base), {**llama_config(layers=2, width=128)}
    scale = stored[f"{UP}.weight_scale"]
    stored[f"{UP}.weight_scale"] = scale.repeat_interleave(4, 1).contiguous()
    groups = {
        f"group_{i}": {"targets": [target], "weights": {**args, "group_size": size}}
        for i, (target, size) in enumerate((("re:.*up_proj", 32), ("Linear", 128)))
    }
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups,
    }  # fmt: skip
    write_model(tmp_path / "two", stored, config)
    words = about(written(tmp_path, "out", "int4", "two", "b"))["config_groups"]
    sizes = {group["weights"]["group_size"]: group["targets"] for group in words.values()}
    assert sizes[32] == [UP]
    assert len(sizes[128]) == 13
    assert "model.layers.0.self_attn.q_proj" in sizes[128]


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    from tests.support.tiny import llama_tensors

    for name, width in (("a", 40), ("b", 40)):
        tensors = llama_tensors(torch.Generator().manual_seed(0), layers=2, width=width)
        write_model(tmp_path / name, tensors, llama_config(layers=2, width=width))
    refused(
        recipe(tmp_path, "int4"), "2 tensors cannot be written in int4",
        "(model.layers.0.mlp.down_proj.weight, model.layers.1.mlp.down_proj.weight)",
        "80 columns are no multiple of the group of 128", "12 tensors",
    )  # fmt: skip
    refused(recipe(tmp_path, "nvfp4"), "40 columns are no multiple of the group of 16")
    refused(recipe(tmp_path, "mxfp4"), "no multiple of the group of 32")
    assert planned(recipe(tmp_path, "fp8_row")).notes
    with pytest.raises(RecipeError, match="Write `out_dtype: int4`"):
        load_recipe(recipe(tmp_path, None, dtype="int4"))
    with pytest.raises(RecipeError, match="Did you mean 'nvfp4'"):
        load_recipe(recipe(tmp_path, "nvfp"))
    goal = [{"task": "loss", "data": "text.txt"}]
    (tmp_path / "text.txt").write_text("text")
    path = recipe(tmp_path, "int4", "greedy_soup", objective=goal)
    refused(path, "not in int4", "Search in bfloat16, then merge the result in int4.")


def test_experts_and_layers_that_are_turned(tmp_path: Path) -> None:
    tensors, *_ = family(tmp_path)
    tensors["model.layers.0.mlp.experts.down_proj"] = torch.ones(4, 128, 128)
    for name in ("a", "b"):
        write_model(tmp_path / name, tensors, llama_config(layers=2, width=128))
    for word in ("int4", "nvfp4", "mxfp4", "fp8_row"):
        refused(recipe(tmp_path, word), "compressed-tensors has experts one by one")
    for name in ("a", "b"):
        config = {**llama_config(layers=2, width=128), "model_type": "gpt2"}
        write_model(tmp_path / name, tensors, config)
    refused(recipe(tmp_path, "int4"), "gpt2 stores its layers [in, out]")


def test_slices_and_names_of_layers(tmp_path: Path) -> None:
    """What config.json says of a layer by its number would be said of another one."""
    parts, words = FORMS["compressed-tensors, rows"]
    slices = [{"sources": [{"model": "q", "layer_range": [0, 1]}]}] * 2
    keys: dict[str, Any] = {"slices": slices}

    def path() -> Path:
        file = recipe(tmp_path, "same", "passthrough", "q", **keys)
        file.write_text(file.read_text().replace("models:\n- model: q\n", ""))
        return file

    quantised(tmp_path, parts, {**words, "ignore": ["model.layers.0.mlp.gate_proj"]})
    refused(path(), "names layers by number (model.layers.0.mlp.gate_proj)")
    quantised(tmp_path, parts, words)
    plan = planned(path())
    names = [output.name for task in plan.tasks for output in task.outputs]
    assert "model.layers.1.mlp.up_proj.weight_scale" in names


def test_two_models_in_two_formats(tmp_path: Path) -> None:
    """A slice of another quantised model cannot be copied under the reference's config."""
    quantised(tmp_path, *FORMS["compressed-tensors, rows"], name="q")
    quantised(tmp_path, *FORMS["FBGEMM, rows"], name="r")
    slices = [
        {"sources": [{"model": name, "layer_range": [i, i + 1]}]}
        for i, name in enumerate(("q", "r"))
    ]
    file = recipe(tmp_path, "same", "passthrough", "q", slices=slices[::-1][:1])
    text = file.read_text().replace("models:\n- model: q\n", "")
    file.write_text(text)
    planned(file)
    slices[1] = {"sources": [{"model": "r", "layer_range": [0, 1]}]}
    file = recipe(tmp_path, "same", "passthrough", "q", slices=slices)
    file.write_text(file.read_text().replace("models:\n- model: q\n", ""))
    refused(file, "quantised in another way than the reference")


def test_an_adapter_on_a_quantised_base_keeps_the_bases_form(tmp_path: Path) -> None:
    """QLoRA: the update is added to the numbers, which are written as the base has them."""
    import json

    from safetensors.torch import save_file

    family(tmp_path)
    base = written(tmp_path, "q", "int4", "a", method="passthrough")
    generator = torch.Generator().manual_seed(9)
    left = torch.randn(256, 4, generator=generator) * 0.05
    right = torch.randn(4, 128, generator=generator) * 0.05
    name = f"base_model.model.{UP}"
    (tmp_path / "lora").mkdir()
    save_file(
        {f"{name}.lora_A.weight": right, f"{name}.lora_B.weight": left},
        tmp_path / "lora" / "adapter_model.safetensors",
    )
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["up_proj"]}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(settings))
    out = written(tmp_path, "out", "same", "q+lora", method="passthrough")
    before, after = read_model(base), read_model(out)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {f"{UP}.weight_packed", f"{UP}.weight_scale"}
    exact = numbers_of(base)[f"{UP}.weight"] + left @ right
    step = exact.abs().amax(1, keepdim=True) / 7.5
    worst = ((numbers_of(out)[f"{UP}.weight"] - exact).abs() / step).max()
    assert worst <= 0.53  # half a step, and a scale that bfloat16 has rounded


def test_the_plan_says_what_is_written(tmp_path: Path) -> None:
    family(tmp_path)
    written(tmp_path, "q", "int4", "a", method="passthrough")
    notes = " ".join(planned(recipe(tmp_path, "same", "soup", "q", "b")).notes)
    assert (
        "14 matrices (98% of the weights) are written in INT4, with a scale for each 128" in notes
    )
    plan = planned(recipe(tmp_path, "same", "passthrough", "q"))
    assert "14 matrices (98% of the weights) are copied byte for byte" in " ".join(plan.notes)
    assert {task.dtype for task in plan.tasks if "_proj" in task.name} == {"I32"}
    assert plan.bytes_written < 300_000
