"""Products of thin matrices: one order of sums, in compiled and in plain loops."""

from __future__ import annotations

import numpy as np
import pytest

from merge_cli.kernels.matrices import low_rank_product


@pytest.mark.parametrize("rank", [1, 7, 8, 9, 16, 19])
@pytest.mark.parametrize(("rows", "columns"), [(1, 3), (5, 513), (3, 1100)])
def test_products_are_added_in_order(rank: int, rows: int, columns: int) -> None:
    random = np.random.default_rng(rank)
    left = random.normal(size=(rows, rank)).astype(np.float32)
    right = random.normal(size=(rank, columns)).astype(np.float32)
    product = low_rank_product(left, right)
    np.testing.assert_array_equal(product, low_rank_product.reference(left, right))
    np.testing.assert_array_equal(product[1:], low_rank_product(left[1:], right))
    np.testing.assert_allclose(product, left.astype(np.float64) @ right, rtol=1e-4, atol=1e-5)
