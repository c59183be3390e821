"""Whatever an adapter is said to hold, PEFT loads: every tensor of the model is compared."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import merge_cli
from merge_cli.errors import SourceError
from merge_cli.options import MergeOptions
from tests.support.adapters import gpt2, gpt_oss, llama, mixtral
from tests.support.architectures import COMMON, DECODER
from tests.support.command import cli

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

AUDIO: dict[str, Any] = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "vocab_size": 48,
    "num_mel_bins": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1, "max_source_positions": 8, "max_target_positions": 16,
}  # fmt: skip
TOWER: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
}  # fmt: skip
IDS = torch.arange(3, 13)[None]
IMAGE = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
MAKERS: dict[str, tuple[Callable[[], Any], dict[str, torch.Tensor]]] = {
    "llama with biases": (lambda: llama(attention_bias=True, mlp_bias=True), {"input_ids": IDS}),
    "qwen2": (lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**DECODER)), {"input_ids": IDS}),
    "gpt2": (gpt2, {"input_ids": IDS}),
    "no head": (lambda: hf.MistralModel(hf.MistralConfig(**DECODER)), {"input_ids": IDS}),
    "classifier": (
        lambda: hf.BertForSequenceClassification(hf.BertConfig(**COMMON, num_labels=3)),
        {"input_ids": IDS}),
    "batch norms": (
        lambda: hf.ResNetForImageClassification(
            hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], num_labels=3)),
        {"pixel_values": IMAGE}),
    "torch's attention": (
        lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**TOWER, image_size=16, patch_size=8)),
        {"pixel_values": IMAGE}),
    "experts": (mixtral, {"input_ids": IDS}),
    "experts with biases": (gpt_oss, {"input_ids": IDS}),
    "routers that choose": (
        lambda: hf.Llama4ForCausalLM(hf.Llama4TextConfig(
            **DECODER, head_dim=8, intermediate_size_mlp=48, num_local_experts=2,
            num_experts_per_tok=1, interleave_moe_layer_step=1, attn_temperature_tuning=False)),
        {"input_ids": IDS}),
    "positions that count": (
        lambda: hf.OPTForCausalLM(hf.OPTConfig(
            hidden_size=16, ffn_dim=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=48,
            max_position_embeddings=32, word_embed_proj_dim=16, tie_word_embeddings=False)),
        {"input_ids": IDS}),
    "hears": (
        lambda: hf.WhisperForConditionalGeneration(
            hf.WhisperConfig(**AUDIO, tie_word_embeddings=False)),
        {"input_features": torch.ones(1, 8, 16), "decoder_input_ids": IDS}),
    "states": (
        lambda: hf.MambaForCausalLM(hf.MambaConfig(
            hidden_size=16, num_hidden_layers=1, vocab_size=48, state_size=4,
            tie_word_embeddings=False)),
        {"input_ids": IDS}),
}  # fmt: skip


def tune(folder: Path, make: Callable[[], Any], changes: Callable[[str], bool]) -> Any:
    """base and tuned, in which what the name asks for is changed: parameters and buffers."""
    torch.manual_seed(0)
    model = make().float()
    model.save_pretrained(folder / "base")
    model = type(model).from_pretrained(folder / "base", dtype=torch.float32)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if changes(name) and value.is_floating_point():
                value += 0.02 * torch.rand(value.shape)
            elif changes(name):
                value += 3  # a counter
    model.save_pretrained(folder / "tuned")
    return model.eval()


def loaded(folder: Path, kind: Any) -> Any:
    base = kind.from_pretrained(folder / "base", dtype=torch.float32)
    return peft.PeftModel.from_pretrained(base, folder / "adapter").eval()


def extract(folder: Path, **options: Any) -> Any:
    options = {"rank": 99, "embeddings": True, **options}
    return merge_cli.extract_lora(
        folder / "tuned", folder / "adapter", base=folder / "base", **options
    )


def outputs(model: Any, prompt: dict[str, torch.Tensor]) -> torch.Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        return model(**prompt)[0]


@pytest.mark.parametrize("case", MAKERS)
def test_every_tensor_is_the_fine_tune_s_or_is_named(tmp_path: Path, case: str) -> None:
    make, prompt = MAKERS[case]
    tuned = tune(tmp_path, make, lambda name: True)
    # With a tied head, PEFT keeps the embedding's factors from it until they are merged.
    tied = getattr(tuned.config, "tie_word_embeddings", False)
    found = extract(tmp_path, embeddings=not tied)
    model = loaded(tmp_path, type(tuned))
    live = outputs(model, prompt)
    merged = model.merge_and_unload()
    # What PEFT adds to a layer's output, and what it adds to its weight, are the same.
    torch.testing.assert_close(live, outputs(merged, prompt), rtol=1e-4, atol=1e-5)
    out = {change.name for change in found.changes if change.why}
    out |= {name.replace(".block_sparse_moe.", ".mlp.") for name in out}  # as it is loaded
    out |= {"lm_head.weight"} if tied else set()
    state, wanted = merged.state_dict(), tuned.state_dict()
    for name, value in wanted.items():
        if not any(name.endswith(stored) for stored in out):
            torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-4, msg=name)
    if not out:
        torch.testing.assert_close(live, outputs(tuned, prompt), rtol=1e-4, atol=1e-4)
    assert any("bias" in name for name in wanted) == any("bias" in c.name for c in found.changes)


@pytest.mark.parametrize("case", MAKERS)
def test_the_adapter_means_the_same_here(tmp_path: Path, case: str) -> None:
    tuned = tune(tmp_path, MAKERS[case][0], lambda name: True)
    extract(tmp_path, embeddings=False)
    recipe = {
        "merge_method": "passthrough", "dtype": "float32",
        "models": [f"{tmp_path / 'base'}+{tmp_path / 'adapter'}"],
    }  # fmt: skip
    notes = merge_cli.plan(recipe).notes
    assert not any("adapter_config.json" in note or "applied" in note for note in notes)
    merge_cli.merge(recipe, tmp_path / "out", options=MergeOptions(device="cpu", threads=1))
    here = type(tuned).from_pretrained(tmp_path / "out", dtype=torch.float32).state_dict()
    theirs = loaded(tmp_path, type(tuned)).merge_and_unload().state_dict()
    for name, value in theirs.items():
        torch.testing.assert_close(here[name], value, rtol=1e-4, atol=1e-5, msg=name)


PARTS: dict[str, tuple[str, Callable[[str], bool]]] = {
    "norms": ("llama with biases", lambda name: "norm" in name),
    "biases": ("qwen2", lambda name: name.endswith("bias")),
    "biases of layers stored [in, out]": ("gpt2", lambda name: name.endswith("attn.bias")),
    "a name that others end with": ("no head", lambda name: name == "norm.weight"),
    "that, and a layer": ("no head", lambda name: name == "norm.weight" or "q_proj" in name),
    "one that ends so": ("no head", lambda name: name == "layers.0.input_layernorm.weight"),
    "buffers": ("batch norms", lambda name: "running_mean" in name),
    "counters and buffers": ("batch norms", lambda n: "running_mean" in n or "tracked" in n),
    "convolutions": ("batch norms", lambda name: "convolution" in name),
    "one bias": ("classifier", lambda name: name == "classifier.bias"),
    "routers": ("routers that choose", lambda name: "router" in name),
    "norms beside experts": ("experts", lambda name: "norm" in name),
}


@pytest.mark.parametrize("part", PARTS)
def test_an_adapter_without_changed_layers_is_loaded(tmp_path: Path, part: str) -> None:
    case, changes = PARTS[part]
    tuned = tune(tmp_path, MAKERS[case][0], changes)
    found = extract(tmp_path)
    assert found.share == pytest.approx(1)
    state = loaded(tmp_path, type(tuned)).merge_and_unload().state_dict()
    for name, value in tuned.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5, msg=name)
    zeros = [note for note in found.notes if "PEFT needs some" in note]
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    factored = any(change.rank for change in found.changes) or "target_parameters" in config
    assert len(zeros) == (not factored)
    assert config["target_modules"] or "target_parameters" in config


def test_what_is_left_out_of_a_module_stays_the_base_s(tmp_path: Path) -> None:
    """The module is saved whole, for the rest of it; its name means another one, too."""
    tuned = tune(tmp_path, MAKERS["no head"][0], lambda name: "norm" in name)
    found = extract(tmp_path, exclude=["input_layernorm"])
    state = loaded(tmp_path, type(tuned)).merge_and_unload().state_dict()
    base = type(tuned).from_pretrained(tmp_path / "base").state_dict()
    for change in found.changes:
        expected = base if change.why else tuned.state_dict()
        assert torch.equal(state[change.name], expected[change.name]), change
    assert sum(change.why == "excluded" for change in found.changes) == 2


def test_no_change_and_none_that_can_be_held_are_refused(tmp_path: Path) -> None:
    tune(tmp_path, llama, lambda name: False)
    with pytest.raises(SourceError, match="equals its base .*there is no change to extract"):
        extract(tmp_path)
    tune(tmp_path, llama, lambda name: "embed" in name)
    with pytest.raises(SourceError, match=r"1 tensor \(an embedding: --embeddings gives it"):
        extract(tmp_path, embeddings=False)
    tune(tmp_path, llama, lambda name: True)
    with pytest.raises(SourceError, match=r"nothing that it has changed .*\(excluded\)"):
        extract(tmp_path, exclude=["weight"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tuned"]


def test_a_model_that_hears_is_called_with_what_it_hears(tmp_path: Path) -> None:
    tune(tmp_path, MAKERS["hears"][0], lambda name: True)
    extract(tmp_path)
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["task_type"] is None


def test_the_command_without_factors(tmp_path: Path) -> None:
    tune(tmp_path, llama, lambda name: "norm" in name)
    command = ["extract-lora", "tuned", "adapter", "--base", "base"]
    ran = cli(*command, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "5 tensors saved in full" in ran.stdout
    assert "PEFT needs some" in ran.stderr
    tune(tmp_path, llama, lambda name: False)
    ran = cli(*command, "--overwrite", cwd=tmp_path)
    assert ran.returncode == 3
    assert "no change to extract" in ran.stderr
