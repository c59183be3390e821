"""Tiny models of transformers' classes, and parents of a merge."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as hf
import yaml

import merge_cli
from merge_cli.options import MergeOptions
from tests.support.tiny import Tensors

VOCABULARY = 96


COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip


DECODER: dict[str, Any] = {
    **COMMON, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def text(_: torch.dtype) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor([[5, 6, 7, 8]])}


@dataclass(frozen=True)
class Architecture:
    """How a kind of model is made, opened and prompted."""

    config: Callable[[], Any]
    auto: Any = hf.AutoModelForCausalLM
    prompt: Callable[[torch.dtype], dict[str, torch.Tensor]] = text
    generates: bool = True

    def load(self, folder: Path) -> Any:
        """Open a folder; nothing may be missing, unexpected, mismatched or unconverted."""
        model, info = self.auto.from_pretrained(folder, dtype="auto", output_loading_info=True)
        wrong = {problem: keys for problem, keys in info.items() if keys}
        assert not wrong
        return model.eval()


def deepseek() -> Any:
    """Four layers, all but the first with experts."""
    return hf.DeepseekV3Config(
        **{**DECODER, "num_hidden_layers": 4, "num_key_value_heads": 4}, n_routed_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=16, first_k_dense_replace=1, n_group=1,
        topk_group=1, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8,
        v_head_dim=8,
    )  # fmt: skip


@torch.no_grad()
def disturb(model: Any, seed: int) -> Any:
    """Add noise to four fifths of every weight and stored buffer."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.state_dict().values():
        noise = torch.randn(tensor.shape, generator=generator) * 0.05
        noise *= torch.rand(tensor.shape, generator=generator) < 0.8
        tensor.add_(noise.to(tensor.dtype))
    return model


@dataclass(frozen=True)
class Parents:
    """A folder with `base` and the variants `a` and `b`, as transformers wrote them."""

    folder: Path
    architecture: Architecture

    def merge(self, out: Path, recipe: Mapping[str, Any] | str, **options: Any) -> Path:
        """Merge by a recipe or by a method with its usual parameters."""
        document = recipe_for(recipe) if isinstance(recipe, str) else dict(recipe)
        path = self.folder / f"{out.name}.yaml"
        path.write_text(yaml.safe_dump(document, sort_keys=False))
        result = merge_cli.merge(path, out, options=MergeOptions(device="cpu"), **options)
        return result.path

    def state(self, name: str) -> Tensors:
        """A parent's tensors by the names that its model has in memory."""
        return state_of(self.architecture.load(self.folder / name))


def write_parents(
    folder: Path, architecture: Architecture, dtype: torch.dtype = torch.bfloat16, **options: Any
) -> Parents:
    torch.manual_seed(0)
    model = architecture.auto.from_config(architecture.config(), dtype=dtype)
    start = state_of(disturb(model, 0))
    for seed, name in enumerate(("base", "a", "b")):
        model.load_state_dict(start)
        (disturb(model, seed) if seed else model).save_pretrained(folder / name, **options)
    return Parents(folder, architecture)


def state_of(model: Any) -> Tensors:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def recipe_for(method: str) -> dict[str, Any]:
    parameters: dict[str, Any] = {
        "ties": {"density": 0.5, "weight": 1.0},
        "dare": {"density": 0.5, "weight": 0.5},
        "slerp": {"t": 0.4},
    }.get(method, {})
    base = "a" if method == "slerp" else "base"
    return {
        "merge_method": method,
        "base_model": base,
        "models": ["a", "b"],
        "parameters": parameters,
    }
