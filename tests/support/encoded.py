"""Models in codes of few bits: written by a merge, and read back as numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from tests.support.quantised import numbers_of
from tests.support.tiny import Tensors, llama_config, llama_tensors, merge, read_model, write_model

WIDTH = 128
WORDS = ("fp8", "fp8_row", "fp8_tensor", "int4", "nvfp4", "mxfp4")
# Bits of a stored number, and those of its scales; of `fp8_row` each row has 16 bits more.
BITS = {
    "fp8": 8 + 32 / 128**2,
    "fp8_tensor": 8,
    "int4": 4 + 16 / 128,
    "nvfp4": 4 + 8 / 16,
    "mxfp4": 4 + 8 / 32,
}


def family(root: Path, *names: str, dtype: torch.dtype = torch.bfloat16) -> list[Tensors]:
    """Llamas of two layers, 128 and 256 wide: each the first one with small changes."""
    generator = torch.Generator().manual_seed(0)
    start = llama_tensors(generator, layers=2, width=WIDTH)
    models: list[Tensors] = []
    for name in names or ("a", "b"):
        models.append({
            key: (value + bool(models) * 0.02 * torch.randn(value.shape, generator=generator))
            .to(dtype) for key, value in start.items()
        })  # fmt: skip
        write_model(root / name, models[-1], llama_config(layers=2, width=WIDTH))
    return models


def recipe(root: Path, word: str | None, method: str = "soup", *models: str, **keys: Any) -> Path:
    """A recipe of the models beside it."""
    document = {
        "merge_method": method,
        "models": [{"model": name} for name in models or ("a", "b")],
        **({"out_dtype": word} if word else {}),
        **keys,
    }
    path = root / "recipe.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def written(
    root: Path, out: str, word: str, *models: str, method: str = "soup", **keys: Any
) -> Path:
    """The folder of a merge in codes."""
    merge(recipe(root, word, method, *models, **keys), root / out, threads=1)
    return root / out


def same_files(first: Path, second: Path) -> bool:
    """Whether two models have the same weights and the same config, byte for byte."""
    names = ("model.safetensors", "config.json")
    return all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


def about(folder: Path) -> dict[str, Any]:
    """What config.json says of the quantisation."""
    config = json.loads((folder / "config.json").read_text())
    words: dict[str, Any] = config.get("quantization_config", {})
    return words


def quantised_names(plain: Mapping[str, torch.Tensor]) -> list[str]:
    return [name for name in plain if "_proj" in name]


__all__ = [
    "BITS", "WIDTH", "WORDS", "about", "family", "numbers_of", "quantised_names", "read_model",
    "recipe", "same_files", "written",
]  # fmt: skip
