"""The numeric primitives against plain references, bit for bit."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from merge_cli.kernels import select
from merge_cli.kernels.cut import count_kept, trimmed
from merge_cli.kernels.fused import StoredBlock, stored_starts
from merge_cli.kernels.mask import keep_mask
from merge_cli.kernels.reduce import (
    BLOCK_MULTIPLE,
    absolute_runs,
    dot_runs,
    exact_sum,
    weighted_sum,
)
from merge_cli.kernels.select import kept_count, magnitude_cuts
from tests.support import oracles

CPU = torch.device("cpu")


class Values:
    """One operand in memory as `select.Stream`, in spans of three blocks.

    Args:
        stored: also as stored blocks, of values (float32) less a base of zeros.
    """

    def __init__(self, values: Any, block: int, *, stored: bool = False) -> None:
        self.values, self.block, self.size, self.stored = values, block, len(values), stored
        self.starts = [*range(0, len(values), 3 * block), len(values)]

    def blocks(self, start: int, stop: int) -> list[list[Any]]:
        return [
            [self.values[s : min(s + self.block, stop)]] for s in range(start, stop, self.block)
        ]

    def sample(self, count: int) -> list[list[Any]]:
        step = max(1, self.size // count)
        return [[self.values[s : s + 1]] for s in range(0, self.size, step)]

    def map(self, work: Any, only: int | None = None) -> list[Any]:
        numbers = range(len(self.starts) - 1) if only is None else [only]
        return [work(self.blocks(self.starts[i], self.starts[i + 1])) for i in numbers]

    def sample_keys(self, count: int) -> None:
        return None

    def map_stored(self, work: Any, only: int | None = None) -> list[Any] | None:
        if not self.stored:
            return None
        spans = [*itertools.pairwise(self.starts)]
        spans = spans if only is None else [spans[only]]
        return [work(map(self.stored_block, self.blocks(*span))) for span in spans]

    def stored_block(self, rows: list[Any]) -> StoredBlock:
        size = len(rows[0])
        starts, kinds = stored_starts([size, size], ["F16", "F32"])
        buffer = np.zeros(starts[-1], np.uint8)
        buffer[starts[1] : starts[1] + 4 * size] = rows[0].view(np.uint8)
        return StoredBlock(buffer, starts[:-1], kinds, 0, size, based=True)


def kept_by_cut(values: Any, density: float, block: int, *, stored: bool = False) -> np.ndarray:
    """Select over blocks, then apply over (other) blocks; torch and numpy alike."""
    if not len(values):
        return np.empty(0, dtype=bool)
    (cut,) = magnitude_cuts([density], Values(values, block, stored=stored))
    steps = [slice(s, s + 2 * block) for s in range(0, len(values), 2 * block)]
    if cut is None:
        return np.ones(len(values), dtype=bool)
    if isinstance(values, np.ndarray):
        counts = [count_kept(values[s], cut, s.start) for s in steps]
        kept = np.concatenate([trimmed([values[s]], [cut], s.start)[0] for s in steps])
        mask = torch.cat(
            [cut.keep(torch.from_numpy(values[s]), s.start) for s in steps]
        ).numpy()  # what is kept though it is 0
        np.testing.assert_array_equal(kept, np.where(mask, values, 0))
        assert sum(counts) == mask.sum()
        return mask
    return torch.cat([cut.keep(values[s], s.start) for s in steps]).numpy()


@settings(max_examples=200, deadline=None)
@given(
    hnp.arrays(np.float32, st.integers(0, 70), elements=st.floats(-4, 4, width=16)),
    st.floats(0.001, 1.0),
    st.sampled_from([1, 7, 64]),
)
def test_cut_keeps_exactly_the_largest(values: np.ndarray, density: float, block: int) -> None:
    expected = oracles.trim(values.astype(np.float64), density) != 0
    if len(values) and not kept_count(density, len(values)):  # one at least is kept
        expected[np.argmax(np.abs(values))] = values.any()
    for form in (torch.from_numpy(values), values):
        kept = kept_by_cut(form, density, block)
        # entries that are zero are kept or not without effect; count them apart
        assert int(kept.sum()) == min(len(values), max(1, kept_count(density, len(values))))
        np.testing.assert_array_equal((kept & (values != 0)), expected)


def largest(values: np.ndarray, density: float) -> np.ndarray:
    order = np.lexsort((np.arange(len(values)), -np.abs(values)))
    mask = np.zeros(len(values), dtype=bool)
    mask[order[: kept_count(density, len(values))]] = True
    return mask


@pytest.mark.parametrize("kind", ["ties", "zeros", "wide", "misleading sample"])
@pytest.mark.parametrize("form", ["numpy", "stored", "torch32", "torch64"])
def test_cut_on_many_values(kind: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal(50_000) * 1e-3
    if kind == "ties":
        values[::3] = np.round(values[::3], 4)
    elif kind == "zeros":
        values[rng.random(50_000) < 0.9] = 0
    elif kind == "wide":
        values *= 2.0 ** rng.integers(-60, 60, 50_000)
    else:  # what is sampled is nothing like the rest
        values[:: 50_000 // 500] *= 1e6
    monkeypatch.setattr(select, "_SMALLEST_SAMPLE", 500)
    values = values if form == "torch64" else values.astype(np.float32)
    stream = values if form in ("numpy", "stored") else torch.from_numpy(values)
    for density in (0.001, 0.29, 0.53, 0.999):
        kept = kept_by_cut(stream, density, 4096, stored=form == "stored")
        np.testing.assert_array_equal(kept, largest(values.astype(np.float64), density))


def test_one_pass_is_enough_as_a_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).standard_normal(1_000_000).astype(np.float32)
    stream, passes = Values(values, 65_536), []
    passed = Values.map

    def counted(work: Any, only: Any = None) -> Any:
        passes.append(only)
        return passed(stream, work, only)

    monkeypatch.setattr(stream, "map", counted)
    magnitude_cuts([0.5], stream)
    assert passes.count(None) == 1


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


def test_sum_does_not_depend_on_blocks_or_arrays() -> None:
    values = torch.randn(5 * BLOCK_MULTIPLE + 17, generator=torch.Generator().manual_seed(1))
    absolute, squares = set(), set()
    for form in (values, values.numpy()):
        for blocks in (1, 2, 5):
            step = blocks * BLOCK_MULTIPLE
            parts = [form[s : s + step] for s in range(0, len(values), step)]
            absolute.add(exact_sum(absolute_runs(part) for part in parts))
            squares.add(exact_sum(dot_runs(part, part) for part in parts))
    assert len(absolute) == len(squares) == 1
    assert math.isclose(absolute.pop(), math.fsum(values.abs().tolist()), rel_tol=1e-12)
    assert math.isclose(squares.pop(), math.fsum(values.double().square().tolist()), rel_tol=1e-12)


def test_sum_is_in_the_documented_order() -> None:
    values = np.random.default_rng(2).standard_normal(1000).astype(np.float32)
    lanes = [0.0] * 64
    for i, value in enumerate(values.tolist()):
        lanes[i % 64] += abs(value)
    total = 0.0
    for lane in lanes:
        total += lane
    assert absolute_runs(values) == absolute_runs(torch.from_numpy(values)) == [total]


def test_weighted_sum_rounds_each_step() -> None:
    """No fused multiply-add: the product is rounded before the sum, as a GPU must, too."""
    a, b = torch.tensor([1 / 3]), torch.tensor([1.0])
    expected = np.float32(np.float32(1 / 3) * np.float32(0.1)) + np.float32(np.float32(0.7))
    assert weighted_sum([0.1, 0.7], [a, b]).item() == expected
    assert torch.equal(a, torch.tensor([1 / 3]))  # inputs are left alone
