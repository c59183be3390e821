"""Adapters against PEFT: what `merge_and_unload` makes of them is what a merge reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
import yaml
from safetensors.torch import load_file, save_file

import merge_cli
from merge_cli.errors import MismatchError, SourceError, UsageError
from merge_cli.evaluation.adapted import apply_adapter
from merge_cli.evaluation.fingerprints import source_fingerprint
from merge_cli.options import MergeOptions
from merge_cli.planning.planner import load_recipe, make_plan
from merge_cli.recipe.reference import ModelRef
from merge_cli.sources.opening import open_source
from tests.support.adapters import LINEAR, OPTIONS, gpt2, llama, merge, passthrough, write
from tests.support.tiny import read_model

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"
)


CASES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "plain": (llama, {"r": 4, "lora_alpha": 6, "target_modules": LINEAR}),
    "rslora": (llama, {"r": 4, "lora_alpha": 6, "target_modules": LINEAR, "use_rslora": True}),
    "patterns": (llama, {
        "r": 4, "lora_alpha": 6, "target_modules": LINEAR,
        "rank_pattern": {"down_proj": 8, "layers.1.self_attn.q_proj": 2},
        "alpha_pattern": {r".*\.0\.self_attn\.v_proj": 32}}),
    "dora": (llama, {"r": 4, "lora_alpha": 6, "target_modules": LINEAR, "use_dora": True}),
    "all linear": (llama, {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"}),
    "modules to save": (llama, {
        "r": 4, "target_modules": LINEAR, "modules_to_save": ["lm_head", "norm"]}),
    "embeddings": (llama, {"r": 4, "target_modules": ["embed_tokens", "q_proj", "lm_head"]}),
    "biases": (lambda: llama(attention_bias=True), {
        "r": 4, "target_modules": ["q_proj"], "bias": "all"}),
    "biases of its layers": (lambda: llama(attention_bias=True), {
        "r": 4, "target_modules": ["q_proj"], "bias": "lora_only"}),
    "biases of the factors": (lambda: llama(attention_bias=True), {
        "r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "lora_bias": True}),
    "stored [in, out]": (gpt2, {
        "r": 4, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "some layers": (llama, {
        "r": 4, "target_modules": LINEAR, "layers_to_transform": [1]}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_is_what_peft_merges(tmp_path: Path, case: str) -> None:
    make, about = CASES[case]
    expected = write(tmp_path, make, 1, **about).state_dict()
    base = read_model(tmp_path / "base")
    found = merge(passthrough(tmp_path), tmp_path / "out")
    assert found.keys() == base.keys()
    changed = 0
    for name, tensor in found.items():
        wanted = next(v for key, v in expected.items() if key.endswith(name))
        torch.testing.assert_close(tensor, wanted, rtol=1e-5, atol=1e-6)
        changed += not torch.equal(tensor, base[name])
    assert changed


@pytest.mark.parametrize(
    ("make", "targets", "said"),
    [(gpt2, ["c_attn", "c_proj"], False), (llama, ["q_proj", "down_proj"], True)],
)
def test_how_layers_are_stored_is_the_class_s_to_say(
    make: Callable[[], Any], targets: list[str], said: bool, tmp_path: Path
) -> None:
    """PEFT says of all layers what it found of the last one, and asks the class when it loads."""
    write(tmp_path, make, 1, r=4, target_modules=targets)
    found = merge(passthrough(tmp_path), tmp_path / "out")
    config = tmp_path / "adapter1" / "adapter_config.json"
    about = json.loads(config.read_text())
    assert about["fan_in_fan_out"] is not said
    config.write_text(json.dumps({**about, "fan_in_fan_out": said}))
    again = merge(passthrough(tmp_path), tmp_path / "again")
    assert all(torch.equal(tensor, found[name]) for name, tensor in again.items())


def test_rounded_once_and_the_same_bytes_however_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = write(tmp_path, llama, 1, r=4, lora_alpha=6, target_modules=LINEAR, use_dora=True)
    recipe = passthrough(tmp_path, dtype="bfloat16")
    whole = merge(recipe, tmp_path / "whole")
    for name, tensor in whole.items():
        rounded = expected.state_dict()[name].bfloat16()
        assert float((tensor != rounded).double().mean()) < 0.01, name  # at a midpoint, perhaps
    from merge_cli.engine import memory
    from merge_cli.planning import chunks as units

    monkeypatch.setattr(units, "UNIT_BYTES", 1)
    for module in (units, memory):
        monkeypatch.setattr(module, "BLOCK_MULTIPLE", 24)  # not a whole number of rows
    monkeypatch.setattr(memory, "_HOST_BLOCK", 24)
    small = merge(recipe, tmp_path / "small")
    assert all(torch.equal(whole[name], small[name]) for name in whole)
    from merge_cli.kernels import compiled

    monkeypatch.setattr(compiled, "available", lambda: "switched off")
    plain = merge(recipe, tmp_path / "plain")
    assert all(torch.equal(whole[name], plain[name]) for name in whole)


def test_adapters_take_part_in_any_merge_and_the_resolved_recipe_repeats_it(tmp_path: Path) -> None:
    models = [
        write(tmp_path, llama, seed, r=4, target_modules=LINEAR).state_dict() for seed in (1, 2)
    ]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "merge_method: ties\nbase_model: base\nmodels:\n"
        "  - {model: base+adapter1, parameters: {density: 0.5}}\n"
        "  - model: {model: {path: base}, lora: {path: adapter2}}\n"
    )
    result = merge_cli.merge(recipe, tmp_path / "out", options=OPTIONS)
    found = read_model(result.path)
    for number, state in enumerate(models):
        for name in found:
            torch.testing.assert_close(
                state[name], merge_cli_passthrough(tmp_path, number + 1)[name],
                rtol=1e-5, atol=1e-6,
            )  # fmt: skip
    # The same merge of what PEFT has merged.
    for number, state in enumerate(models, start=1):
        net = llama()
        net.load_state_dict(state)
        net.save_pretrained(tmp_path / f"merged{number}")
    recipe.write_text(
        "merge_method: ties\nbase_model: base\nmodels:\n"
        "  - {model: merged1, parameters: {density: 0.5}}\n  - model: merged2\n"
    )
    plain = merge(recipe, tmp_path / "plain")
    for name in found:
        close = (found[name] - plain[name]).abs() < 1e-5
        assert float(close.double().mean()) > 0.99, name
    written = yaml.safe_load((result.path / "merge_recipe.yaml").read_text())
    assert [one["model"] for one in written["models"]] == [
        "../base+../adapter1", "../base+../adapter2"
    ]  # fmt: skip
    assert len(set(written["inputs"].values())) == 3
    again = merge(result.path / "merge_recipe.yaml", tmp_path / "again")
    assert all(torch.equal(found[name], again[name]) for name in found)
    file = tmp_path / "adapter2" / "adapter_model.safetensors"
    save_file({k: v * 2 for k, v in load_file(file).items()}, file)
    with pytest.raises(SourceError, match="is not the model that this recipe was resolved with"):
        merge_cli.merge(result.path / "merge_recipe.yaml", tmp_path / "third", options=OPTIONS)


def merge_cli_passthrough(folder: Path, number: int) -> dict[str, torch.Tensor]:
    out = folder / f"through{number}"
    if out.exists():
        return read_model(out)
    return merge(passthrough_of(folder, f"base+adapter{number}"), out)


def passthrough_of(folder: Path, source: str) -> Path:
    path = folder / "through.yaml"
    path.write_text(f"merge_method: passthrough\nmodels: [{{model: {source}}}]\n")
    return path


def test_stopped_and_continued_with_another_adapter_is_refused(tmp_path: Path) -> None:
    from merge_cli.engine.journal import work_key

    write(tmp_path, llama, 1, r=4, target_modules=LINEAR)
    recipe = passthrough(tmp_path)
    key = work_key(make_plan(load_recipe(recipe)), "cpu", True)
    assert key == work_key(make_plan(load_recipe(recipe)), "cpu", True)
    config = tmp_path / "adapter1" / "adapter_config.json"
    about = json.loads(config.read_text())
    config.write_text(json.dumps({**about, "lora_alpha": 99}))
    assert key != work_key(make_plan(load_recipe(recipe)), "cpu", True)


def test_what_is_not_applied_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path, llama, 1, r=4, target_modules=LINEAR)
    recipe, folder = passthrough(tmp_path), tmp_path / "adapter1"
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors, about = load_file(weights), json.loads(config.read_text())

    def with_tensors(changed: dict[str, torch.Tensor]) -> None:
        save_file(changed, weights)

    prefix = "base_model.model.model.layers.0."
    with_tensors({**tensors, f"{prefix}self_attn.z_proj.lora_A.weight": torch.zeros(4, 16)})
    with pytest.raises(MismatchError, match="the adapter changes it, the model lacks it"):
        make_plan(load_recipe(recipe))
    with_tensors({**tensors, f"{prefix}gate.weight": torch.zeros(4, 16)})
    with pytest.raises(MismatchError, match="the adapter brings it, the model lacks it"):
        make_plan(load_recipe(recipe))
    name = f"{prefix}self_attn.q_proj.lora_B.weight"
    with_tensors({k: v for k, v in tensors.items() if k != name})
    with pytest.raises(MismatchError, match="lacks a factor"):
        make_plan(load_recipe(recipe))
    with_tensors({**tensors, name: torch.zeros(15, 4)})
    with pytest.raises(MismatchError, match=r"factors \[4, 16\] and \[15, 4\] do not make"):
        make_plan(load_recipe(recipe))
    with_tensors(tensors)
    config.write_text(json.dumps({**about, "peft_type": "LOHA"}))
    with pytest.raises(SourceError, match="of the kind LOHA"):
        make_plan(load_recipe(recipe))
    config.unlink()
    with pytest.raises(SourceError, match="is no adapter: it has no adapter_config"):
        make_plan(load_recipe(recipe))
    with pytest.raises(SourceError, match="no such adapter folder: ./nowhere/x"):
        make_plan(load_recipe(passthrough(tmp_path, "base+./nowhere/x")))
    with pytest.raises(SourceError, match="LoRA adapter, not a model") as caught:
        make_plan(load_recipe(passthrough(tmp_path, "adapter1")))
    assert "BASE+adapter1" in caught.value.hint


def test_more_tokens_come_with_their_vocabulary(tmp_path: Path) -> None:
    write(tmp_path, llama, 1, r=4, target_modules=["q_proj"],
          modules_to_save=["embed_tokens", "lm_head"])  # fmt: skip
    weights = tmp_path / "adapter1" / "adapter_model.safetensors"
    grown = {
        name: torch.cat([value, torch.ones(2, 16)]) if len(value) == 48 else value
        for name, value in load_file(weights).items()
    }
    save_file(grown, weights)
    found = merge(passthrough(tmp_path), tmp_path / "out")
    assert found["model.embed_tokens.weight"].shape == (50, 16)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 50
    hf.LlamaForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("case", CASES)
def test_a_model_runs_with_its_adapter(tmp_path: Path, case: str) -> None:
    """Loaded, it has the weights that the merge of the two writes."""
    make, about = CASES[case]
    write(tmp_path, make, 1, **about)
    source = make_plan(load_recipe(passthrough(tmp_path))).sources[0]
    merged = merge(passthrough(tmp_path), tmp_path / "out")
    net = hf.AutoModelForCausalLM.from_pretrained(source.root, dtype=torch.float32)
    apply_adapter(net, source)
    parameters = dict(net.named_parameters())
    for name, tensor in merged.items():
        found = next(value for key, value in parameters.items() if key.endswith(name))
        torch.testing.assert_close(found, tensor.float(), rtol=0, atol=0)


def test_what_the_base_was_worth_is_not_taken_for_the_adapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results are kept by what a model is, its adapter included."""
    monkeypatch.setenv("MERGE_CLI_CACHE", str(tmp_path / "cache"))
    write(tmp_path, llama, 1, r=4, target_modules=LINEAR)
    source = make_plan(load_recipe(passthrough(tmp_path))).sources[0]
    base = open_source(ModelRef(str(tmp_path / "base")), tmp_path)
    first = source_fingerprint(source)
    assert first != source_fingerprint(base)
    weights = tmp_path / "adapter1" / "adapter_model.safetensors"
    save_file({name: 2 * value for name, value in load_file(weights).items()}, weights)
    assert source_fingerprint(source) != first


def test_an_adapter_on_an_fp8_base(tmp_path: Path) -> None:
    expected = write(tmp_path, llama, 1, r=4, lora_alpha=6, target_modules=["q_proj"])
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.self_attn.q_proj.weight"
    weight = tensors[name].to(torch.float8_e4m3fn)
    save_file({**tensors, name: weight, f"{name}_scale_inv": torch.full((1, 1), 2.0)}, file,
              metadata={"format": "pt"})  # fmt: skip
    config = tmp_path / "base" / "config.json"
    about = json.loads(config.read_text())
    about["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config.write_text(json.dumps(about))
    found = merge(passthrough(tmp_path, dtype="float32"), tmp_path / "out")
    update = expected.state_dict()[name] - tensors[name]
    torch.testing.assert_close(found[name], weight.float() * 2 + update, rtol=1e-5, atol=1e-6)


def test_an_adapter_must_not_be_overwritten(tmp_path: Path) -> None:
    write(tmp_path, llama, 1, r=4, target_modules=LINEAR)
    with pytest.raises(UsageError):
        merge_cli.merge(passthrough(tmp_path), tmp_path / "adapter1",
                        options=MergeOptions(device="cpu", overwrite=True))  # fmt: skip
