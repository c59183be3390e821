"""A quantised model against its dequantised twin: the same numbers, the same merges."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from merge_cli.checkpoint.headers import TensorRef, parse_header, read_header_file
from merge_cli.checkpoint.tensors import read_numbers, reading
from merge_cli.engine import memory
from merge_cli.formats import stored_matrix
from merge_cli.planning import chunks as units
from merge_cli.recipe.reference import ModelRef
from merge_cli.sources.opening import open_source
from merge_cli.sources.source import Source
from tests.support.tiny import Tensors, merge, write_model


def opened(folder: Path) -> Source:
    return open_source(ModelRef(str(folder)), folder.parent)


def stored_refs(folder: Path) -> dict[str, TensorRef]:
    """The tensors of a model's one file, whatever its config says of them."""
    file = folder / "model.safetensors"
    return parse_header(read_header_file(file, ""), file, file.stat().st_size, "")


def assert_numbers(folder: Path, twin: Mapping[str, torch.Tensor], seed: int = 0) -> None:
    """Every tensor as it is in the twin, bit for bit: whole, and any span of it.

    Args:
        twin: float32, by name.
    """
    tensors = opened(folder).tensors
    assert tensors.keys() == twin.keys()
    chosen = random.Random(seed)
    with reading() as read:
        for name, wanted in twin.items():
            tensor, numbers = tensors[name], wanted.float().reshape(-1).numpy()
            assert tensor.shape == tuple(wanted.shape), name
            whole = read_numbers(read, tensor, 0, tensor.size)
            np.testing.assert_array_equal(whole, numbers, err_msg=name)
            for _ in range(12):
                start = chosen.randrange(tensor.size)
                count = chosen.randint(1, min(tensor.size - start, chosen.choice([3, 70, 10**6])))
                span = read_numbers(read, tensor, start, count)
                np.testing.assert_array_equal(span, numbers[start : start + count], err_msg=name)


def assert_merges_alike(
    folder: Path, twin: Mapping[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Soups and ties with plain models: the bytes that the float32 twin gives, by any blocks."""
    root = folder.parent
    config = dict(opened(folder).config)
    write_model(root / "twin", {k: v.float().contiguous() for k, v in twin.items()}, config)
    generator = torch.Generator().manual_seed(7)
    for name in ("base", "other"):
        changed = {
            key: (value + 0.05 * torch.randn(value.shape, generator=generator)).bfloat16()
            for key, value in twin.items()
        }
        write_model(root / name, changed, config)
    recipes: dict[str, dict[str, object]] = {
        "soup": {"merge_method": "soup", "models": ["MODEL", "other"]},
        "ties": {"merge_method": "ties", "base_model": "base", "models": ["MODEL", "other"],
                 "parameters": {"density": 0.5}},
        "based": {"merge_method": "task_arithmetic", "base_model": "MODEL", "models": ["other"],
                  "parameters": {"weight": 0.5}},
    }  # fmt: skip
    for name, recipe in recipes.items():
        wanted = _merged(root, f"{name}-twin", recipe, "twin")
        assert_equal(_merged(root, f"{name}-quantised", recipe, folder.name), wanted)
        with monkeypatch.context() as patch:
            patch.setattr(units, "UNIT_BYTES", 1)
            for module in (units, memory):
                patch.setattr(module, "BLOCK_MULTIPLE", 20)  # in the middle of rows and groups
            patch.setattr(memory, "_HOST_BLOCK", 20)
            patch.setattr(stored_matrix, "STRIP_BYTES", 50)
            assert_equal(_merged(root, f"{name}-blocks", recipe, folder.name, threads=2), wanted)


def assert_equal(found: Tensors, wanted: Tensors) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def _merged(
    root: Path, name: str, recipe: Mapping[str, object], model: str, threads: int = 1
) -> Tensors:
    text = json.dumps({**recipe, "dtype": "bfloat16"}).replace("MODEL", model)
    document = yaml.safe_load(text)
    document["models"] = [{"model": entry} for entry in document["models"]]
    path = root / f"{name}.yaml"
    path.write_text(yaml.safe_dump(document))
    return merge(path, root / f"out-{name}", threads=threads)


def numbers_of(folder: Path) -> Tensors:
    """A model's tensors as they are read: float32."""
    with reading() as read:
        return {
            name: torch.from_numpy(read_numbers(read, tensor, 0, tensor.size)).reshape(tensor.shape)
            for name, tensor in opened(folder).tensors.items()
        }
