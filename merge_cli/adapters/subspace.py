"""The leading directions of a matrix, from a few products with it: block Krylov, by Lanczos.

    q_0 = orthonormal(random D^T)     q_1 = orthonormal(q_0 D D^T)     q_2 = orthonormal(q_1 D D^T)

The space of all q holds nearly the best directions there are: Musco and Musco, arXiv:1504.05477.
Each block is made orthogonal to all blocks before it, so that the q are one orthonormal basis and
q D is at hand for each: the matrix is read once for a block. Small blocks, and more of them, say
more than large ones for as many products (Golub and Underwood, "The block Lanczos method for
computing eigenvalues", 1977). Only products with the matrix are float32; what makes vectors
orthogonal is float64.
"""

from __future__ import annotations

from typing import Any

from merge_cli.kernels.matrices import (
    combine_rows,
    gram_product,
    orthonormalise,
    project_rows,
    symmetric_eigen,
)

# Of a vector's length. What a product leaves outside of the directions before it is rounding of
# float32 if it is shorter.
_ROUNDING = 1e-5
# Of a vector's length, what may be along the directions before it; and what is at best.
_SKEW, _EXACT = 1e-8, 1e-16


def leading_directions(matrix: Any, rank: int, block: int, blocks: int) -> tuple[Any, Any]:
    """Nearly the leading directions of D, which are orthonormal, and D in their terms.

    Args:
        matrix: float32 [rows, columns], numpy or torch, not zero; D is its transpose if it has more
            rows than columns.
        rank: how many, at most; fewer are left where the matrix has no more.
        block: vectors that are multiplied at once.
        blocks: of them, one after another.

    Returns:
        numpy float64 [k, rows of D], the leading one first, and float32 [k, columns of D], their
        products with D.
    """
    import numpy as np

    few, many = sorted(matrix.shape)
    wide = matrix.shape[0] <= matrix.shape[1]
    start = np.random.default_rng(0).standard_normal((block, many), np.float32)
    multiply = project_rows if wide else combine_rows
    vectors = multiply(matrix, start).astype(np.float64)
    room = block * blocks
    basis, products = np.empty((room, few)), np.empty((room, many), np.float32)
    small = np.zeros((room, room))  # the lower half of basis D D^T basis^T
    count, least, skew = 0, _lengths(vectors), _EXACT
    for _ in range(blocks):
        vectors = orthonormalise(vectors, _ROUNDING * least)
        if not len(vectors):
            break  # D leads out of the space no more
        before, count = count, count + len(vectors)
        basis[before:count] = vectors
        products[before:count], vectors = gram_product(matrix, vectors.astype(np.float32))
        least = _lengths(vectors)
        small[before:count, :count] = project_rows(basis[:count], vectors)
        vectors -= combine_rows(basis[:count], small[before:count, :count])
        # Where directions are alike, so little is left of a vector that its rounding counts, and
        # more of it with each block.
        shortest = np.maximum(_ROUNDING * least, np.finfo(np.float64).tiny)
        skew *= float((least / np.maximum(_lengths(vectors), shortest)).max())
        if skew > _SKEW:
            rest = project_rows(basis[:count], vectors)
            if (np.abs(rest).max(1) > _SKEW * _lengths(vectors)).any():
                vectors -= combine_rows(basis[:count], rest)
            skew = _EXACT
    lower = np.tril(small[:count, :count])
    _, turns = symmetric_eigen(lower + np.tril(lower, -1).T)
    turns = turns[:rank]
    in_its_terms = combine_rows(products[:count], turns.astype(np.float32))
    return combine_rows(basis[:count], turns), in_its_terms


def _lengths(rows: Any) -> Any:
    import numpy as np

    return np.sqrt(np.square(rows).sum(1))
