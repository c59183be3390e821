"""Products and decompositions of matrices, on the calling thread alone.

A pool's threads do this side by side. BLAS and LAPACK would bring threads of their own, which wait
for one another in loops: on a busy machine that is tens of times slower. And the last bits of what
they compute depend on the number of those threads.

The product of two thin matrices is added up in a written order: element (i, j) is the sum over k of
left[i, k] * right[k, j], from k = 0 on, every product and every sum rounded by itself in float32.
So it depends on neither the rows that are asked for together nor on a BLAS library's blocks.
"""

from __future__ import annotations

from typing import Any

from merge_cli.kernels.backend import array_primitive, backend_of, host_primitive
from merge_cli.kernels.reduce import dot_runs, exact_sum

_CACHED = 2**15  # elements of a tensor that are squared at once
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
    nothing = np.empty((0, 0))
    compiled.tridiagonal(products, diagonal, off_diagonal, nothing)
    if not compiled.eigenvalues(
        diagonal, off_diagonal, np.empty((len(small), 0))
    ):  # the iteration has not converged
        return singular_values.reference(matrix)
    return _without_noise(np.sqrt(np.maximum(np.sort(diagonal)[::-1], 0.0)))


def _wider_than_tall(matrix: Any) -> Any:
    """The matrix or its transpose: A A^T is then the smaller of the two products."""
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T


def _without_noise(values: Any) -> Any:
    import numpy as np

    return np.where(values < _NOISE * values[0], 0.0, values)


@host_primitive
def add_low_rank(left: Any, right: Any, scale: float, out: Any) -> None:
    """out += scale * (left @ right), in place.

    Args:
        left, right, out: numpy float32 [n, rank], [rank, m] and [n, m].
    """
    import numpy as np

    product = np.zeros_like(out)
    for k in range(left.shape[1]):
        product += left[:, k, None] * right[None, k]
    product *= np.float32(scale)
    out += product


@add_low_rank.compiled
def _add_low_rank_compiled(left: Any, right: Any, scale: float, out: Any) -> None:
    import numpy as np

    from merge_cli.kernels import compiled

    factors = np.ascontiguousarray(left), np.ascontiguousarray(right)
    target = np.ascontiguousarray(out)
    compiled.add_low_rank(*factors, np.float32(scale), target)
    if target is not out:
        out[:] = target


@host_primitive
def symmetric_eigen(matrix: Any) -> tuple[Any, Any]:
    """Eigenvalues, the largest first, and eigenvectors as rows, of a symmetric matrix (float64)."""
    import numpy as np

    values, vectors = np.linalg.eigh(matrix)
    return values[::-1], np.ascontiguousarray(vectors.T[::-1])


@symmetric_eigen.compiled
def _symmetric_eigen_compiled(matrix: Any) -> tuple[Any, Any]:
    import numpy as np

    from merge_cli.kernels import compiled

    size = len(matrix)
    values, off_diagonal, rows = np.empty(size), np.empty(size), np.eye(size)
    reflectors = np.zeros((size, size))
    compiled.tridiagonal(matrix.copy(), values, off_diagonal, reflectors)
    if not compiled.eigenvalues(values, off_diagonal, rows):  # the iteration has not converged
        return symmetric_eigen.reference(matrix)
    order = np.argsort(-values, kind="stable")
    rows = rows[order]
    compiled.reflect(rows, reflectors)
    return values[order], rows


@array_primitive
def combine_rows(matrix: Any, vectors: Any) -> Any:
    """vectors [k, rows] times matrix [rows, columns]; numpy.

    Args:
        matrix: float32, numpy or torch; or, in numpy, float64.
        vectors: numpy, of the same dtype, which is that of the result.
    """
    return _times(vectors, matrix)


@combine_rows.compiled
def _combine_rows_compiled(matrix: Any, vectors: Any) -> Any:
    import numpy as np

    from merge_cli.kernels import compiled

    padded = _padded(vectors)
    out = np.empty((len(padded), matrix.shape[1]), matrix.dtype)
    compiled.combine_rows(matrix, padded, out)
    return out[: len(vectors)]


@array_primitive
def project_rows(matrix: Any, vectors: Any) -> Any:
    """vectors [k, columns] times the transpose of matrix [rows, columns]; numpy float64.

    Args:
        matrix: float32, numpy or torch; or, in numpy, float64.
        vectors: numpy, of the same dtype.
    """
    return _times(vectors, matrix.T).astype("f8")


@project_rows.compiled
def _project_rows_compiled(matrix: Any, vectors: Any) -> Any:
    import numpy as np

    from merge_cli.kernels import compiled

    padded = _padded(vectors)
    out = np.empty((len(padded), len(matrix)))
    compiled.project_rows(matrix, padded, out)
    return out[: len(vectors)]


@array_primitive
def gram_product(matrix: Any, vectors: Any) -> tuple[Any, Any]:
    """vectors D, and vectors D D^T, where D is the matrix, or its transpose if that is wider.

    Args:
        matrix: float32, numpy or torch.
        vectors: numpy float32 [k, rows of D].

    Returns:
        numpy float32 [k, columns of D] and float64 [k, rows of D].
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    middle = _times(vectors, wide)
    return middle, _times(middle, wide.T).astype("f8")


def _times(vectors: Any, matrix: Any) -> Any:
    """The product of numpy's vectors and a matrix of numpy or torch; numpy."""
    if backend_of(matrix) == "compiled":
        return vectors @ matrix
    import torch

    return (torch.from_numpy(vectors).to(matrix.device) @ matrix).cpu().numpy()


@gram_product.compiled
def _gram_product_compiled(matrix: Any, vectors: Any) -> tuple[Any, Any]:
    import numpy as np

    from merge_cli.kernels import compiled

    few, many = sorted(matrix.shape)
    padded = _padded(vectors)
    middle = np.empty((len(padded), many), np.float32)
    out = np.empty((len(padded), few))
    compiled.gram_product(matrix, padded, middle, out)
    return middle[: len(vectors)], out[: len(vectors)]


def _padded(vectors: Any) -> Any:
    """With rows of zeros: compiled products take four vectors at once."""
    import numpy as np

    rows, columns = vectors.shape
    if not rows % 4:
        return np.ascontiguousarray(vectors)
    padded = np.zeros((-(-rows // 4) * 4, columns), vectors.dtype)
    padded[:rows] = vectors
    return padded


@host_primitive
def orthonormalise(rows: Any, least: Any) -> Any:
    """Orthonormal rows (numpy float64) of the same span; the array may be overwritten.

    Args:
        least: for each row the length that must be left of it, or it is dropped.
    """
    import numpy as np

    count = 0
    for row, length in zip(rows, least, strict=True):
        for _ in range(2):
            row -= (rows[:count] @ row) @ rows[:count]
        after = np.linalg.norm(row)
        if after > length:
            rows[count] = row / after
            count += 1
    return rows[:count]


@orthonormalise.compiled
def _orthonormalise_compiled(rows: Any, least: Any) -> Any:
    from merge_cli.kernels import compiled

    return rows[: compiled.orthonormalise(rows, least)]


@array_primitive
def sum_of_squares(matrix: Any) -> float:
    """Of a float32 array, in float64."""
    flat, total = matrix.reshape(-1), 0.0
    for start in range(0, matrix.shape[0] * matrix.shape[1], _CACHED):
        part = flat[start : start + _CACHED]
        wide = part.astype("f8") if backend_of(part) == "compiled" else part.double()
        total = total + wide @ wide  # one wait for a device, at the end
    return float(total)


@sum_of_squares.compiled
def _sum_of_squares_compiled(matrix: Any) -> float:
    flat = matrix.reshape(-1)
    return exact_sum([dot_runs(flat, flat)])
