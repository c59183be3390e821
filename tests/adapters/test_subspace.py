"""Directions of a Krylov space against a full decomposition in float64."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_cli.adapters.factors import RankTruncation, _krylov_size, factorise, needs_torch
from merge_cli.adapters.subspace import leading_directions


def with_spectrum(shape: tuple[int, int], values: Any, seed: int) -> Any:
    generator = np.random.default_rng(seed)
    few, many = sorted(shape)
    left = np.linalg.qr(generator.normal(size=(few, few)))[0]
    right = np.linalg.qr(generator.normal(size=(many, few)))[0]
    matrix = ((left * values) @ right.T).astype(np.float32)
    return np.ascontiguousarray(matrix if shape[0] <= shape[1] else matrix.T)


@given(
    st.integers(1, 12), st.floats(0.0, 3.0), st.integers(100, 160), st.integers(0, 200),
    st.booleans(), st.integers(0, 99),
)  # fmt: skip
@settings(deadline=None, max_examples=25)
def test_they_hold_nearly_what_the_best_hold(
    rank: int, decay: float, few: int, more: int, tall: bool, seed: int
) -> None:
    shape = (few + more, few) if tall else (few, few + more)
    matrix = with_spectrum(shape, np.arange(1.0, few + 1) ** -decay, seed)
    values = np.linalg.svd(matrix.astype("f8"), compute_uv=False) ** 2
    factors = factorise(matrix, RankTruncation(rank))
    assert factors is not None
    best = values[:rank].sum()
    error = np.square(matrix - factors.left.astype("f8") @ factors.right).sum()
    # Measured, not estimated: what the product lacks is exactly what the share says.
    assert factors.share == pytest.approx(1 - error / values.sum(), abs=2e-6)
    held = factors.share * values.sum() / best
    assert 0.96 if decay < 0.5 else 0.995 <= held <= 1 + 1e-6


@pytest.mark.parametrize("decay", [0.0, 1e-7, 5e-6, 2e-5, 1e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("rank", [1, 7])
def test_directions_that_are_nearly_alike(decay: float, rank: int) -> None:
    """A turn of space, or nearly one: of each product next to nothing is outside the space."""
    matrix = with_spectrum((130, 130), np.arange(1.0, 131) ** -decay, 3)
    factors = factorise(matrix, RankTruncation(rank))
    assert factors is not None
    error = np.square(matrix - factors.left.astype("f8") @ factors.right).sum()
    squares = np.square(matrix.astype("f8")).sum()
    assert factors.share == pytest.approx(1 - error / squares, abs=2e-6)
    assert factors.share > 0.96 * rank / 130


@pytest.mark.parametrize("true_rank", [0, 1, 3, 8, 30])
def test_a_matrix_of_lower_rank_comes_back_with_that_rank(true_rank: int) -> None:
    generator = np.random.default_rng(true_rank)
    left, right = generator.normal(size=(300, true_rank)), generator.normal(size=(true_rank, 420))
    matrix = (left @ right).astype(np.float32)
    factors = factorise(matrix, RankTruncation(16))
    if not true_rank:
        assert factors is None
        return
    assert factors is not None
    assert factors.rank == min(true_rank, 16)
    if true_rank <= 16:
        assert factors.share == pytest.approx(1, abs=1e-6)
        product = factors.left.astype("f8") @ factors.right
        np.testing.assert_allclose(product, matrix, atol=1e-5 * np.abs(matrix).max())


def test_a_change_of_one_row_and_one_column() -> None:
    matrix = np.zeros((300, 500), np.float32)
    matrix[7], matrix[:, 9] = 3.0, 0.001
    factors = factorise(matrix, RankTruncation(4))
    assert factors is not None
    assert factors.rank == 2
    np.testing.assert_allclose(factors.left.astype("f8") @ factors.right, matrix, atol=2e-6)


@pytest.mark.parametrize("shape", [(200, 500), (500, 200)])
def test_directions_are_orthonormal_whatever_computes_them(shape: tuple[int, int]) -> None:
    matrix = np.random.default_rng(5).normal(size=shape).astype(np.float32)
    wide = matrix if shape[0] < shape[1] else matrix.T
    shares = []
    for form in (matrix, torch.from_numpy(matrix)):
        directions, other = leading_directions(form, 8, *_krylov_size(8))
        np.testing.assert_allclose(directions @ directions.T, np.eye(8), atol=1e-9)
        np.testing.assert_allclose(directions @ wide, other, atol=1e-4)
        shares.append(np.square(other.astype("f8")).sum())
    assert shares[0] == pytest.approx(shares[1], rel=1e-4)


def test_many_threads_compute_the_same_bytes() -> None:
    matrix = np.random.default_rng(6).normal(size=(200, 300)).astype(np.float32)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: factorise(matrix, RankTruncation(8)), range(8)))
    assert len({r.left.tobytes() + r.right.tobytes() for r in results if r is not None}) == 1


def test_torch_is_needed_for_large_exact_cuts_alone() -> None:
    model = [(896, 896), (4864, 896), (128, 896)]
    assert not needs_torch(model, RankTruncation(16), "cpu")
    assert not needs_torch(model, RankTruncation(64), "cpu")
    assert needs_torch(model, RankTruncation(200), "cpu")
    assert needs_torch(model, RankTruncation(energy=0.5), "cpu")
    assert needs_torch(model, RankTruncation(16), "cuda:0")
    assert not needs_torch([(256, 9000)], RankTruncation(energy=0.5), "cpu")
