"""The k-th largest magnitude of rows in memory: compiled, plain, and by its definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from merge_cli.kernels.keys import _distinct_keys, few_keys, keys
from merge_cli.kernels.kth_largest import _sorted_ranks, kth_largest


def sample(kind: str, size: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    row = rng.standard_normal(size).astype(np.float32)
    if kind == "ties":
        row = np.round(row, 1)
    elif kind == "zeros":
        row[rng.random(size) < 0.9] = -0.0
    elif kind == "wide":
        row *= np.float32(2) ** rng.integers(-140, 120, size)
    elif kind == "not finite":
        row[rng.random(size) < 0.3] = np.nan
        row[rng.random(size) < 0.3] = -np.inf
    elif kind == "equal":
        row[:] = -1.5
    elif kind in ("sampled small", "sampled large"):  # a sample of every so many is no guide
        row[:: max(1, size // 1024)] *= np.float32(1e-9 if kind == "sampled small" else 1e9)
    return row


KINDS = ["normal", "ties", "zeros", "wide", "not finite", "equal", "sampled small", "sampled large"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 2, 7, 1000, 2049])
@pytest.mark.parametrize("wide", [False, True])
def test_ranks_are_those_of_the_definition(kind: str, size: int, wide: bool) -> None:
    rows = [sample(kind, size, seed) for seed in range(3)]
    if wide:
        rows = [row.astype(np.float64) for row in rows]
    ks = [1, size, -(-size // 2)]
    ranks = kth_largest(rows, ks)
    for row, k, (key, last) in zip(rows, ks, ranks, strict=True):
        row_keys = keys(row)
        # The definition: the first k by falling key, equal ones by rising index.
        order = np.lexsort((np.arange(size), -row_keys.astype(np.float64)))
        expected = np.zeros(size, bool)
        expected[order[:k]] = True
        kept = row_keys > key
        kept[: last + 1] |= row_keys[: last + 1] == key
        np.testing.assert_array_equal(kept, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.001, 0.29, 0.5, 0.999, 1.0])
def test_compiled_and_plain_agree(kind: str, share: float) -> None:
    rows = [sample(kind, 70_001, seed) for seed in range(2)]
    ks = [max(1, int(share * 70_001))] * 2
    assert kth_largest(rows, ks) == _sorted_ranks(rows, ks)
    # The same rows as one matrix, which is what a worker loads.
    assert kth_largest(list(np.stack(rows)), ks) == _sorted_ranks(rows, ks)


@given(
    st.lists(st.integers(0, 12), max_size=40), st.integers(0, 12), st.integers(0, 12),
    st.integers(1, 9), st.sampled_from([np.uint32, np.uint64]),
)  # fmt: skip
def test_few_keys_are_all_that_lie_there(
    sample: list[int], low: int, high: int, most: int, kind: type
) -> None:
    low, high = min(low, high), max(low, high)
    there = sorted({key for key in sample if low <= key <= high})
    expected = there if len(there) <= most else []
    assert few_keys(np.array(sample, kind), low, high, most) == expected
    if kind is np.uint32:
        distinct = np.zeros(most, np.uint32)
        count = _distinct_keys.reference(np.array(sample, kind), low, high, distinct)
        assert count == min(len(there), most + 1)
