"""WUDI against its loss, written down as in the paper and followed by autograd in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.tiny import Family, llama_family, merge, to_array, write_model


def loss(merged: torch.Tensor, deltas: list[torch.Tensor]) -> torch.Tensor:
    """sum_i ||(tau_m - tau_i) tau_i^T||_F^2 / ||tau_i||_F^2, arXiv:2503.08099."""
    total = merged.new_zeros(())
    for delta in deltas:
        if delta.any():
            total = total + ((merged - delta) @ delta.T).square().sum() / delta.square().sum()
    return total


def descended(deltas: list[torch.Tensor], steps: int, rate: float) -> torch.Tensor:
    merged = torch.stack(deltas).sum(0).requires_grad_()
    optimizer = torch.optim.Adam([merged], lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(merged, deltas).backward()
        optimizer.step()
    return merged.detach()


def deltas_of(family: Family, name: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
    base, models = family.arrays(name)
    return torch.from_numpy(base), [torch.from_numpy(model - base) for model in models]


def is_linear(name: str, tensor: torch.Tensor) -> bool:
    return tensor.ndim == 2 and "embed" not in name


@pytest.fixture
def family(tmp_path: Path) -> Family:
    return llama_family(tmp_path, dtype=torch.float64)


def test_the_papers_descent(family: Family, tmp_path: Path) -> None:
    settings = {"iterations": 25, "learning_rate": 1e-3, "lambda": 0.7}
    merged = merge(family.recipe("wudi", parameters=settings), tmp_path / "out")
    for name, tensor in merged.items():
        base, deltas = deltas_of(family, name)
        mean = torch.stack(deltas).mean(0)
        change = descended(deltas, 25, 1e-3) if is_linear(name, tensor) else mean
        np.testing.assert_allclose(to_array(tensor), (base + 0.7 * change).numpy(), rtol=1e-9,
                                   atol=1e-9)  # fmt: skip


def test_the_minimum_itself(family: Family, tmp_path: Path) -> None:
    recipe = family.recipe("wudi", parameters={"solver": "exact"})
    merged = merge(recipe, tmp_path / "out")
    for name, tensor in merged.items():
        base, deltas = deltas_of(family, name)
        if not is_linear(name, tensor):
            continue
        found = (torch.from_numpy(to_array(tensor)) - base).requires_grad_()
        best = loss(found, deltas)
        best.backward()
        assert float(found.grad.abs().max()) < 1e-8  # type: ignore[union-attr]
        assert best < loss(descended(deltas, 200, 1e-3), deltas)
        # Nearest to the sum: what was added lies in the rows of the sources.
        rows = torch.cat(deltas)
        added = found.detach() - torch.stack(deltas).sum(0)
        left = added - added @ torch.linalg.pinv(rows) @ rows
        assert float(left.abs().max()) < 1e-8


def test_sources_that_do_not_disturb_each_other_are_added(tmp_path: Path) -> None:
    """Task vectors on different inputs: the sum is the minimum, and nothing moves."""
    family = llama_family(tmp_path, dtype=torch.float64)
    base, name = family.base, "model.layers.0.mlp.up_proj.weight"
    generator = torch.Generator().manual_seed(3)
    changes = []
    for label, columns in (("a", slice(None, 8)), ("b", slice(8, None))):
        change = torch.zeros_like(base[name])
        size = change[:, columns].shape
        change[:, columns] = torch.randn(size, generator=generator, dtype=torch.float64)
        write_model(tmp_path / label, {**base, name: base[name] + change})
        changes.append(change)
    recipe = family.recipe("wudi", models=(None, None), parameters={"solver": "exact"})
    merged = merge(recipe, tmp_path / "out")
    torch.testing.assert_close(merged[name], base[name] + changes[0] + changes[1])


def test_input_first_is_the_transpose(family: Family, tmp_path: Path) -> None:
    plain = merge(family.recipe("wudi", parameters={"solver": "exact"}), tmp_path / "plain")
    settings = {"solver": "exact", "input_first": True}
    turned = merge(family.recipe("wudi", parameters=settings), tmp_path / "turned")
    name = "model.layers.1.mlp.down_proj.weight"
    assert not torch.allclose(plain[name], turned[name])
    base, deltas = deltas_of(family, name)
    found = (turned[name] - base).T
    transposed = [delta.T for delta in deltas]
    at_minimum = loss(found, transposed)
    assert at_minimum < loss(torch.stack(transposed).sum(0), transposed)


def test_threads_and_shards_change_nothing(tmp_path: Path) -> None:
    family = llama_family(tmp_path, dtype=torch.bfloat16)
    recipe = family.recipe("wudi", parameters={"iterations": 5})
    one = merge(recipe, tmp_path / "one", threads=1)
    two = merge(recipe, tmp_path / "two", threads=3)
    assert all(torch.equal(one[name], two[name]) for name in one)
