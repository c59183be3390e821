"""Every method on tensors that are not matrices of float32: without dimensions, with one element or
none, and of float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from merge_cli.methods.method import Method
from merge_cli.methods.registry import all_methods
from tests.support.tiny import Family, Tensors, merge, write_model

STATIC = [method for method in all_methods() if method.plain]
SHAPES = {
    "scalar": (), "one": (1,), "one_by_one": (1, 1), "empty": (0,), "no_rows": (0, 4),
    "no_columns": (4, 0), "row": (1, 5), "column": (5, 1), "cube": (2, 3, 4),
}  # fmt: skip
SHARED: dict[str, Any] = {"slerp": {"t": 0.3}, "nearswap": {"t": 0.01}}
EACH: dict[str, Any] = {"density": 0.6, "weight": 0.7, "gamma": 0.05, "epsilon": 0.1, "scale": 0.5}
BASES = ("base", "a", "b", "c")


def write(folder: Path, models: list[Tensors]) -> Family:
    for name, tensors in zip(BASES, models, strict=True):
        write_model(folder / name, tensors, {"model_type": "odd"})
    return Family(folder, models[0], models[1:])


def recipe_of(method: Method, family: Family) -> Path:
    own = {n: v for n, v in EACH.items()
           if n in method.parameters and method.parameters[n].per_model}  # fmt: skip
    models = [own or None] * (method.count[1] or 3)
    shared = SHARED.get(method.name, {})
    keys = {"parameters": shared} if shared else {}
    if method.base_is_source and not method.needs_base:
        keys["base_model"] = "a"
    return family.recipe(method.name, base=method.needs_base, models=models, **keys)


def odd(seed: int, dtype: torch.dtype) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype)
            for name, shape in SHAPES.items()}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("method", STATIC, ids=lambda method: method.name)
def test_every_shape(method: Method, dtype: torch.dtype, tmp_path: Path) -> None:
    family = write(tmp_path, [odd(seed, dtype) for seed in range(4)])
    merged = merge(recipe_of(method, family), tmp_path / "out")
    assert {name: tuple(tensor.shape) for name, tensor in merged.items()} == SHAPES
    assert all(tensor.dtype == dtype and tensor.isfinite().all() for tensor in merged.values())


@pytest.mark.parametrize("method", STATIC, ids=lambda method: method.name)
def test_scalars_are_merged_as_vectors_of_one_are(method: Method, tmp_path: Path) -> None:
    values = (0.5, 0.75, -0.25, 1.5)
    models = [{"x": torch.tensor(value), "y": torch.tensor([value])} for value in values]
    # Masks are a function of a tensor's name: nothing is dropped here.
    family = write(tmp_path, models)
    text = recipe_of(method, family).read_text()
    family.write(text.replace("density: 0.6", "density: 1.0").replace("epsilon: 0.1", "epsilon: 0"))
    merged = merge(tmp_path / "recipe.yaml", tmp_path / "out")
    assert merged["x"].item() == merged["y"].item()


# What would make a change of its own size: a scale, steps of a descent, a least change.
EXACT: dict[str, Any] = {"ram": {"epsilon": 0.0}, "ramplus_tl": {"epsilon": 0.0},
                         "wudi": {"iterations": 0}}  # fmt: skip
# model_stock takes changes as short as these for none.
SIZES = {"model_stock": 1e-4}


@pytest.mark.parametrize("method", STATIC, ids=lambda method: method.name)
def test_float64_is_not_rounded_to_float32(method: Method, tmp_path: Path) -> None:
    """Changes of 1e-8, which float32 does not see beside weights of 1."""
    generator = torch.Generator().manual_seed(0)
    base = 1 + torch.rand(64, 32, generator=generator, dtype=torch.float64)
    shared, *own = torch.randn(4, 64, 32, generator=generator, dtype=torch.float64)
    size = SIZES.get(method.name, 1e-8)
    shared, own = shared * size, [change * size for change in own]
    models = [base, *(base + shared + change / 4 for change in own)]
    family = write(tmp_path, [{"layers.0.mlp.weight": model} for model in models])
    recipe = yaml.safe_load(recipe_of(method, family).read_text())
    if method.name in EXACT:
        recipe["parameters"] = EXACT[method.name]
    if method.name == "passthrough":
        recipe["models"] = ["a"]
    merged = merge(family.write(recipe), tmp_path / "out")["layers.0.mlp.weight"]
    assert size / 100 < (merged - base).abs().max().item() < size * 100
    assert (merged.float().double() != merged).double().mean() > 0.9
