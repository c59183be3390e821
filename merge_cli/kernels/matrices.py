"""Singular values of a small matrix, on the calling thread alone.

A pool's threads do this side by side. LAPACK would bring threads of its own, which wait for one
another in loops: on a busy machine that is tens of times slower.

A product of two thin matrices, added up in a written order.

Element (i, j) is the sum over k of left[i, k] * right[k, j], from k = 0 on, every product and every
sum rounded by itself in float32. So it depends on neither the rows that are asked for together nor
on a BLAS library's blocks.
"""

from __future__ import annotations

from typing import Any

_NOISE = 1e-7  # of the largest: below it the products of rows have no digits left


def singular_values(matrix: Any) -> Any:
    """Singular values of a matrix (numpy, float64), the largest first; numpy.

    They are roots of the eigenvalues of A A^T, good to about 1e-7 of the largest; smaller ones
    are 0.
    """
    import numpy as np

    from merge_cli.kernels import compiled

    small = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    if not compiled.available():
        small = np.ascontiguousarray(small)
        products = np.empty((len(small), len(small)))
        squares, beside = np.empty(len(small)), np.empty(len(small))
        compiled.own_products(small, products)
        compiled.tridiagonal(products, squares, beside)
        if compiled.eigenvalues(squares, beside):
            values = np.sqrt(np.maximum(np.sort(squares)[::-1], 0.0))
            return np.where(values < _NOISE * values[0], 0.0, values)
    values = np.linalg.svd(small, compute_uv=False)
    return np.where(values < _NOISE * values[0], 0.0, values)


def low_rank_product(left: Any, right: Any) -> Any:
    """left [n, rank] times right [rank, m], numpy float32; float32 [n, m]."""
    import numpy as np

    from merge_cli.kernels import compiled

    out = np.zeros((left.shape[0], right.shape[1]), np.float32)
    if not compiled.available():
        compiled.low_rank_product(np.ascontiguousarray(left), np.ascontiguousarray(right), out)
        return out
    for k in range(left.shape[1]):
        out += left[:, k, None] * right[None, k]
    return out
