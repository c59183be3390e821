"""The numeric primitives against plain references, bit for bit."""

from __future__ import annotations

import math

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from merge_cli.kernels.mask import keep_mask
from merge_cli.kernels.reduce import BLOCK_MULTIPLE, ExactSum, weighted_sum
from merge_cli.kernels.select import kept_count, magnitude_cuts

CPU = torch.device("cpu")


def kept_by_cut(values: torch.Tensor, density: float, block: int) -> torch.Tensor:
    """Select over blocks, then apply over (other) blocks."""

    def blocks():
        return ((s, [values[s : s + block]]) for s in range(0, len(values), block))

    (cut,) = magnitude_cuts([density], len(values), blocks)
    if cut is None:
        return torch.ones(len(values), dtype=torch.bool)
    return torch.cat([cut.keep(v, s) for s, (v,) in blocks()] or [torch.empty(0).bool()])


@settings(max_examples=200, deadline=None)
@given(
    hnp.arrays(np.float32, st.integers(0, 70), elements=st.floats(-4, 4, width=16)),
    st.floats(0.001, 1.0),
    st.sampled_from([1, 7, 64]),
)
def test_cut_keeps_exactly_the_largest(values: np.ndarray, density: float, block: int) -> None:
    kept = kept_by_cut(torch.from_numpy(values), density, block)
    expected = oracles.trim(values.astype(np.float64), density) != 0
    # entries that are zero are kept or not without effect; count them apart
    assert int(kept.sum()) == kept_count(density, len(values))
    np.testing.assert_array_equal((kept.numpy() & (values != 0)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cut_on_many_values(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    values = (torch.randn(50_000, generator=generator, dtype=torch.float64) * 1e-3).to(dtype)
    values[::3] = values[::3].bfloat16().to(dtype)  # many exact ties
    for density in (0.001, 0.29, 0.53, 0.999):
        kept = kept_by_cut(values, density, 4096)
        order = np.lexsort((np.arange(len(values)), -values.abs().double().numpy()))
        expected = np.zeros(len(values), dtype=bool)
        expected[order[: kept_count(density, len(values))]] = True
        np.testing.assert_array_equal(kept.numpy(), expected)


def test_kept_count_is_exact() -> None:
    assert kept_count(0.29, 100) == 29  # 0.29 * 100 is 28.999999999999996 in floating point
    assert kept_count(0.57, 100_000_000) == 57_000_000
    assert kept_count(0.5, 7) == 3
    assert kept_count(1.0, 10**13) == 10**13


@pytest.mark.parametrize("start", [0, 1000, 2**31 - 40, 2**32 - 40, 3 * 2**32 + 5])
@pytest.mark.parametrize("density", [1e-9, 0.1, 0.53, 0.999, 1.0])
def test_mask_is_the_oracle(start: int, density: float) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    mask = keep_mask(3, 1, name, start, 100, density, CPU)
    expected = oracles.keep_mask(3, 1, name, 100, density, start=start)
    np.testing.assert_array_equal(mask.numpy(), expected)


def test_mask_does_not_depend_on_blocks() -> None:
    whole = keep_mask(0, 0, "w", 0, 10_000, 0.3, CPU)
    parts = [keep_mask(0, 0, "w", s, 1000, 0.3, CPU) for s in range(0, 10_000, 1000)]
    assert torch.equal(whole, torch.cat(parts))


def test_sum_does_not_depend_on_blocks() -> None:
    values = torch.randn(5 * BLOCK_MULTIPLE + 17, generator=torch.Generator().manual_seed(1))
    sums = []
    for blocks in (1, 2, 5):
        total = ExactSum()
        for start in range(0, len(values), blocks * BLOCK_MULTIPLE):
            total.add(values[start : start + blocks * BLOCK_MULTIPLE])
        sums.append(total.value)
    assert len(set(sums)) == 1
    assert math.isclose(sums[0], math.fsum(values.tolist()), rel_tol=1e-12)


def test_weighted_sum_rounds_each_step() -> None:
    """No fused multiply-add: the product is rounded before the sum, as a GPU must, too."""
    a, b = torch.tensor([1 / 3]), torch.tensor([1.0])
    expected = np.float32(np.float32(1 / 3) * np.float32(0.1)) + np.float32(np.float32(0.7))
    assert weighted_sum([0.1, 0.7], [a, b]).item() == expected
    assert torch.equal(a, torch.tensor([1 / 3]))  # inputs are left alone
