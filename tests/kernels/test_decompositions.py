"""Products with few vectors and small eigenproblems: what numpy says in float64."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_cli.kernels import matrices

SIZES = st.integers(1, 40)


@given(SIZES, SIZES, st.integers(1, 9), st.integers(0, 99), st.sampled_from(["f4", "f8"]))
@settings(deadline=None)
def test_products_are_numpys(rows: int, columns: int, count: int, seed: int, kind: str) -> None:
    generator = np.random.default_rng(seed)
    matrix = generator.normal(size=(rows, columns)).astype(kind)
    left = generator.normal(size=(count, rows)).astype(kind)
    right = generator.normal(size=(count, columns)).astype(kind)
    combined, projected = left.astype("f8") @ matrix, right.astype("f8") @ matrix.T
    tolerance = 1e-5 if kind == "f4" else 1e-13
    close = partial(np.testing.assert_allclose, rtol=tolerance, atol=10 * tolerance)
    for form in (matrix, torch.from_numpy(matrix)):
        close(matrices.combine_rows(form, left), combined)
        close(matrices.project_rows(form, right), projected)
    assert matrices.combine_rows(matrix, left).dtype == kind
    assert matrices.project_rows(matrix, right).dtype == "f8"


@pytest.mark.parametrize("shape", [(30, 2500), (2500, 30), (300, 300), (1, 7), (5, 1)])
def test_a_product_with_the_gram_matrix_is_numpys(shape: tuple[int, int]) -> None:
    generator = np.random.default_rng(0)
    matrix = generator.normal(size=shape).astype(np.float32)
    vectors = generator.normal(size=(6, min(shape))).astype(np.float32)
    wide = matrix.astype("f8") if shape[0] <= shape[1] else matrix.T.astype("f8")
    for form in (matrix, torch.from_numpy(matrix)):
        middle, product = matrices.gram_product(form, vectors)
        np.testing.assert_allclose(middle, vectors @ wide, rtol=1e-4, atol=1e-3)
        wanted = vectors @ wide @ wide.T
        np.testing.assert_allclose(product, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


@given(st.integers(1, 30), st.integers(0, 6), st.integers(0, 99))
@settings(deadline=None)
def test_eigenvectors_are_lapacks(size: int, missing: int, seed: int) -> None:
    rows = np.random.default_rng(seed).normal(size=(size, max(1, size - missing)))
    matrix = rows @ rows.T
    values, vectors = matrices.symmetric_eigen(matrix)
    scale = 1e-13 * max(1.0, float(values[0]))
    np.testing.assert_allclose(values, np.linalg.eigvalsh(matrix)[::-1], atol=30 * scale)
    np.testing.assert_allclose(vectors @ vectors.T, np.eye(size), atol=1e-12)
    np.testing.assert_allclose(vectors.T * values @ vectors, matrix, atol=30 * scale)


def test_equal_eigenvalues_have_orthonormal_vectors() -> None:
    matrix = np.diag([2.0, 2.0, 2.0, 0.0, 0.0])
    values, vectors = matrices.symmetric_eigen(matrix)
    assert values.tolist() == [2, 2, 2, 0, 0]
    np.testing.assert_allclose(vectors @ vectors.T, np.eye(5), atol=1e-15)


@given(st.integers(1, 8), st.integers(0, 5), st.integers(0, 99))
@settings(deadline=None)
def test_orthonormal_rows_span_what_the_rows_did(count: int, repeated: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    rows = generator.normal(size=(count, 20))
    mixed = generator.normal(size=(repeated, count)) @ rows
    every = np.concatenate([rows, mixed, np.zeros((1, 20))])
    least = 1e-9 * np.linalg.norm(every, axis=1)
    for function in (matrices.orthonormalise, matrices.orthonormalise.reference):
        basis = function(every.copy(), least)
        assert basis.shape == (count, 20)
        np.testing.assert_allclose(basis @ basis.T, np.eye(count), atol=1e-9)
        np.testing.assert_allclose(every @ basis.T @ basis, every, atol=1e-8)


@given(SIZES, SIZES, st.integers(0, 99))
@settings(deadline=None)
def test_squares_are_added_in_float64(rows: int, columns: int, seed: int) -> None:
    matrix = np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)
    wanted = pytest.approx(float(np.square(matrix.astype("f8")).sum()), rel=1e-14)
    assert matrices.sum_of_squares(matrix) == wanted
    assert matrices.sum_of_squares(torch.from_numpy(matrix)) == wanted
    assert matrices.sum_of_squares.reference(matrix) == wanted
