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

from merge_cli.kernels.backend import host_primitive

_NOISE = 1e-7  # of the largest: below it the products of rows have no digits left


@host_primitive
def singular_values(matrix: Any) -> Any:
    """Singular values of a matrix (numpy, float64), the largest first; numpy.

    They are roots of the eigenvalues of A A^T, good to about 1e-7 of the largest; smaller ones
    are 0.
    """
    import numpy as np

    return _without_noise(np.linalg.svd(_wider_than_tall(matrix), compute_uv=False))


@singular_values.compiled
def _singular_values_compiled(matrix: Any) -> Any:
    import numpy as np

    from merge_cli.kernels import compiled

    small = np.ascontiguousarray(_wider_than_tall(matrix))
    products = np.empty((len(small), len(small)))
    diagonal, off_diagonal = np.empty(len(small)), np.empty(len(small))
    compiled.own_products(small, products)
    compiled.tridiagonal(products, diagonal, off_diagonal)
    if not compiled.eigenvalues(diagonal, off_diagonal):  # the iteration has not converged
        return singular_values.reference(matrix)
    return _without_noise(np.sqrt(np.maximum(np.sort(diagonal)[::-1], 0.0)))


def _wider_than_tall(matrix: Any) -> Any:
    """The matrix or its transpose: A A^T is then the smaller of the two products."""
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T


def _without_noise(values: Any) -> Any:
    import numpy as np

    return np.where(values < _NOISE * values[0], 0.0, values)


@host_primitive
def low_rank_product(left: Any, right: Any) -> Any:
    """left [n, rank] times right [rank, m], numpy float32; float32 [n, m]."""
    import numpy as np

    out = np.zeros((left.shape[0], right.shape[1]), np.float32)
    for k in range(left.shape[1]):
        out += left[:, k, None] * right[None, k]
    return out


@low_rank_product.compiled
def _low_rank_product_compiled(left: Any, right: Any) -> Any:
    import numpy as np

    from merge_cli.kernels import compiled

    out = np.zeros((left.shape[0], right.shape[1]), np.float32)
    compiled.low_rank_product(np.ascontiguousarray(left), np.ascontiguousarray(right), out)
    return out
