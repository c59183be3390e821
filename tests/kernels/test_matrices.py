"""Products of thin matrices: one order of sums, in compiled and in plain loops."""

from __future__ import annotations

import numpy as np
import pytest

from merge_cli.kernels.matrices import add_low_rank


@pytest.mark.parametrize("rank", [1, 7, 8, 9, 16, 19])
@pytest.mark.parametrize(("rows", "columns"), [(1, 3), (5, 513), (3, 1100)])
def test_products_are_added_in_order(rank: int, rows: int, columns: int) -> None:
    random = np.random.default_rng(rank)
    left = random.normal(size=(rows, rank)).astype(np.float32)
    right = random.normal(size=(rank, columns)).astype(np.float32)
    before = random.normal(size=(rows, columns)).astype(np.float32)
    added, plain, part = before.copy(), before.copy(), before[1:].copy()
    add_low_rank(left, right, 0.3, added)
    add_low_rank.reference(left, right, 0.3, plain)
    add_low_rank(left[1:], right, 0.3, part)
    np.testing.assert_array_equal(added, plain)
    np.testing.assert_array_equal(added[1:], part)
    in_place = np.zeros((rows, columns + 5), np.float32)
    in_place[:, 2:-3] = before
    add_low_rank(left, right, 0.3, in_place[:, 2:-3])
    np.testing.assert_array_equal(in_place[:, 2:-3], added)
    exact = before + 0.3 * (left.astype(np.float64) @ right)
    np.testing.assert_allclose(added, exact, rtol=1e-4, atol=1e-5)
