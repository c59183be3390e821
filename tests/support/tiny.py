"""Tiny models for tests, and the few lines that merge and read them back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import load_file, save_file

import merge_cli
from merge_cli.options import MergeOptions

Tensors = dict[str, torch.Tensor]


def write_model(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any] | None = None,
    shards: int = 1,
) -> Path:
    """Write a model folder: config.json, safetensors, and an index where there are several."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config or {"model_type": "llama"})))
    names = list(tensors)
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map: dict[str, str] = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def read_model(folder: Path) -> Tensors:
    """All tensors of a folder."""
    tensors: Tensors = {}
    for file in sorted(folder.glob("model*.safetensors")):
        tensors |= load_file(file)
    return tensors


def llama_tensors(
    generator: torch.Generator, *, layers: int = 4, width: int = 16, vocabulary: int = 48,
    tied: bool = True,
) -> Tensors:  # fmt: skip
    """Random float32 tensors with Llama's names."""

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.1

    tensors = {"model.embed_tokens.weight": normal(vocabulary, width)}
    for i in range(layers):
        at = f"model.layers.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            tensors[f"{at}self_attn.{name}.weight"] = normal(width, width)
        tensors[f"{at}mlp.up_proj.weight"] = normal(2 * width, width)
        tensors[f"{at}mlp.gate_proj.weight"] = normal(2 * width, width)
        tensors[f"{at}mlp.down_proj.weight"] = normal(width, 2 * width)
        tensors[f"{at}input_layernorm.weight"] = 1 + normal(width)
        tensors[f"{at}post_attention_layernorm.weight"] = 1 + normal(width)
    tensors["model.norm.weight"] = 1 + normal(width)
    if not tied:
        tensors["lm_head.weight"] = normal(vocabulary, width)
    return tensors


def llama_config(
    *, layers: int = 4, width: int = 16, vocabulary: int = 48, tied: bool = True
) -> dict[str, Any]:
    """The config that goes with `llama_tensors`."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": width,
        "intermediate_size": 2 * width, "num_hidden_layers": layers, "num_attention_heads": 4,
        "num_key_value_heads": 4, "vocab_size": vocabulary, "tie_word_embeddings": tied,
        "dtype": "bfloat16", "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A base and its fine-tunes on disk, and what is in them."""

    folder: Path
    base: Tensors
    models: list[Tensors]
    names: list[str] = field(default_factory=lambda: ["a", "b", "c"])

    def recipe(
        self,
        method: str,
        *,
        base: bool = True,
        models: Sequence[Mapping[str, Any] | None] = (None, None, None),
        **keys: Any,
    ) -> Path:
        """Write recipe.yaml beside the models; `models` gives each one's parameters."""
        entries = [
            {"model": name, **({"parameters": dict(parameters)} if parameters else {})}
            for name, parameters in zip(self.names, models, strict=False)
        ]
        document = {
            "merge_method": method,
            **({"base_model": "base"} if base else {}),
            "models": entries,
            **keys,
        }
        return self.write(document)

    def write(self, document: Mapping[str, Any] | str) -> Path:
        """Write any recipe beside the models."""
        path = self.folder / "recipe.yaml"
        path.write_text(
            document
            if isinstance(document, str)
            else yaml.safe_dump(dict(document), sort_keys=False)
        )
        return path

    def arrays(self, name: str) -> tuple[np.ndarray, list[np.ndarray]]:
        """One tensor of the base and of every model, in float64."""
        return to_array(self.base[name]), [to_array(model[name]) for model in self.models]


def llama_family(
    folder: Path, *, dtype: torch.dtype = torch.bfloat16, layers: int = 4, seed: int = 0,
    shards: int = 1, tied: bool = True,
) -> Family:  # fmt: skip
    """Write base, a, b and c: the base plus small changes, a part of them exactly zero."""
    generator = torch.Generator().manual_seed(seed)
    start = llama_tensors(generator, layers=layers, tied=tied)
    config = llama_config(layers=layers, tied=tied)
    written = []
    for name in ("base", "a", "b", "c"):
        tensors: Tensors = {}
        for key, value in start.items():
            change = torch.randn(value.shape, generator=generator) * 0.02
            change *= torch.rand(value.shape, generator=generator) < 0.8
            tensors[key] = (value if name == "base" else value + change).to(dtype)
        write_model(folder / name, tensors, config, shards)
        written.append(tensors)
    return Family(folder, written[0], written[1:])


def merge(recipe: Path, out: Path, shard_size: int = 5_000_000_000, **options: Any) -> Tensors:
    """Merge on the CPU and read the result back."""
    options.setdefault("device", "cpu")
    result = merge_cli.merge(recipe, out, shard_size=shard_size, options=MergeOptions(**options))
    return read_model(result.path)


def to_array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().numpy()
