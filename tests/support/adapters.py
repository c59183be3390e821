"""Tiny models with LoRA adapters, as PEFT writes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
import yaml

import merge_cli
from merge_cli.options import MergeOptions
from tests.support.tiny import read_model

OPTIONS = MergeOptions(device="cpu", threads=1)


LINEAR = ["q_proj", "v_proj", "down_proj"]


def llama(**changes: Any) -> Any:
    torch.manual_seed(0)
    about = {
        "vocab_size": 48, "hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False,
        "max_position_embeddings": 64, **changes,
    }  # fmt: skip
    return hf.LlamaForCausalLM(hf.LlamaConfig(**about))


def gpt2() -> Any:
    torch.manual_seed(0)
    about = {"vocab_size": 48, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**about))


def write(folder: Path, make: Callable[[], Any], seed: int, **about: Any) -> Any:
    """base and an adapter with random factors; returns what PEFT makes of the two."""
    base = make()
    if not (folder / "base").exists():
        base.save_pretrained(folder / "base")
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **about))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            with torch.no_grad():
                # DoRA's lengths stay near what they are.
                parameter.copy_(parameter + noise if "magnitude" in name else noise)
    model.save_pretrained(folder / f"adapter{seed}")
    return model.merge_and_unload()


def passthrough(folder: Path, source: Any = "base+adapter1", **keys: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({
        "merge_method": "passthrough", "models": [{"model": source}], **keys,
    }, sort_keys=False))  # fmt: skip
    return path


def merge(recipe: Path, out: Path) -> dict[str, torch.Tensor]:
    return read_model(merge_cli.merge(recipe, out, options=OPTIONS).path)


peft = pytest.importorskip("peft")


IDS = torch.arange(1, 15).reshape(2, 7)


def stirred(model: Any, scale: float = 0.05) -> Any:
    """With other numbers in everything that is trained."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * scale)
    return model.eval()


def train(folder: Path, make: Any, **about: Any) -> Any:
    """A base, an adapter of it in `adapter1`, and the model that was trained."""
    make().save_pretrained(folder / "base")
    base = type(make()).from_pretrained(folder / "base")
    model = stirred(
        peft.get_peft_model(base, peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **about}))
    )
    model.save_pretrained(folder / "adapter1")
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def assert_same(folder: Path, model: Any, kind: Any = hf.LlamaForCausalLM, **keys: Any) -> None:
    expected = logits(model)
    merge(passthrough(folder, **keys), folder / "out")
    loaded, about = kind.from_pretrained(folder / "out", output_loading_info=True)
    assert not about["missing_keys"]
    assert not about["unexpected_keys"]
    torch.testing.assert_close(logits(loaded.eval()), expected, rtol=1e-4, atol=1e-5)


EXPERTS, HIDDEN = 4, 16


def mixtral() -> Any:
    torch.manual_seed(0)
    return hf.MixtralForCausalLM(hf.MixtralConfig(
        vocab_size=48, hidden_size=HIDDEN, intermediate_size=12, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=EXPERTS))  # fmt: skip


def gpt_oss() -> Any:
    torch.manual_seed(0)
    return hf.GptOssForCausalLM(hf.GptOssConfig(
        vocab_size=48, hidden_size=HIDDEN, intermediate_size=HIDDEN, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_local_experts=EXPERTS,
        num_experts_per_tok=2))  # fmt: skip
