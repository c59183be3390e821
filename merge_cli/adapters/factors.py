"""Low-rank factors of matrices: truncated singular value decompositions.

The truncation is the best approximation of its rank (Eckart and Young, "The approximation of one
matrix by another of lower rank", Psychometrika 1936). It is computed in one of two ways:

    exact     the eigenvectors of the smaller Gram matrix, D D^T = U S^2 U^T. In float64 rounding is
              1e-8 of the largest singular value, less than float32 weights hold. In float32 it is
              3e-4, and enough for an energy: what stands out of the rest that is cut off is larger
    subspace  where few directions of many are needed: those of a Krylov space (`subspace`)

On a CPU both are compiled loops on the calling thread, but for Gram matrices that are large: those
are torch's work. The share of the matrix that the product holds is measured, not estimated.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from merge_cli.adapters.subspace import leading_directions
from merge_cli.kernels.matrices import (
    combine_rows,
    orthonormalise,
    project_rows,
    sum_of_squares,
    symmetric_eigen,
)

# Of the largest eigenvalue: anything smaller is rounding.
_ROUNDING, _SINGLE_ROUNDING = 1e-14, 1e-12
_SPAN_ROUNDING = 1e-12  # of a row: what it has outside of the rows before
_SUBSPACE_SHARE = 2  # the subspace is used where it has at most one in two of all directions
_SINGLE_ENERGY = 0.99  # up to here an energy is cut in float32
_CHUNK = 2**21  # elements of the matrix that are held in float64 at once
_SMALL_GRAM = 256  # rows of a Gram matrix that is made without torch, in float64


@dataclass(frozen=True)
class RankTruncation:
    """Keep at most `rank` directions, or as few as hold `energy` of the sum of squares, a share in
    (0, 1]; whichever are fewer."""

    rank: int | None = None
    energy: float | None = None

    def __str__(self) -> str:
        words = [f"rank {self.rank}"] if self.rank else []
        words += [f"{100 * self.energy:g} % of the sum of squares"] if self.energy else []
        return ", or ".join(words) or "all of it"


@dataclass(frozen=True)
class Factors:
    """`left` [rows, rank] times `right` [rank, columns], numpy float32, of equal norms.

    Attributes:
        share: of the matrix's sum of squares that the product holds.
        squares: the matrix's sum of squares.
    """

    left: Any
    right: Any
    share: float
    squares: float

    @property
    def rank(self) -> int:
        return int(self.left.shape[1])

    @property
    def transposed(self) -> Factors:
        """The factors of the transposed matrix."""
        return Factors(_plain(self.right.T), _plain(self.left.T), self.share, self.squares)


def zeros(shape: Sequence[int]) -> Factors:
    """Factors of no change to a matrix."""
    import numpy as np

    rows, columns = shape
    return Factors(np.zeros((rows, 1), np.float32), np.zeros((1, columns), np.float32), 1.0, 0.0)


def factorise(matrix: Any, cut: RankTruncation, device: str = "cpu") -> Factors | None:
    """B = U sqrt(S) and A = sqrt(S) V^T of a matrix; None of one that is zero.

    Args:
        matrix: numpy float32 [rows, columns].
        device: torch's name of the device to compute on.
    """
    import numpy as np

    array = _on_device(matrix, device)
    squares = sum_of_squares(array)
    if not squares:
        return None
    few = min(matrix.shape)
    if _in_subspace(few, cut):
        assert cut.rank is not None
        basis, other = leading_directions(array, cut.rank, *_krylov_size(cut.rank))
    elif few <= _SMALL_GRAM and array is matrix:
        basis, other = _from_small_gram(matrix, cut, squares)
    else:
        basis, other = _from_gram(array, cut, squares)
    lengths = np.square(other, dtype=np.float64).sum(1)
    kept = lengths > _SINGLE_ROUNDING * lengths.max()
    basis, other, root = basis[kept], other[kept], lengths[kept] ** 0.25
    share = min(1.0, float(lengths[kept].sum()) / squares)
    left, right = _plain(basis.T * root), _plain(other / root[:, None])
    factors = Factors(left, right, share, squares)
    return factors.transposed if matrix.shape[0] > matrix.shape[1] else factors


def needs_torch(shapes: Iterable[Sequence[int]], cut: RankTruncation, device: str) -> bool:
    """Whether torch has to decompose one of these matrices."""
    return device != "cpu" or any(
        min(shape) > _SMALL_GRAM and not _in_subspace(min(shape), cut) for shape in shapes
    )


def recombine(lefts: Any, rights: Any, cut: RankTruncation) -> Factors | None:
    """Truncate the product of two thin matrices without computing it.

    Args:
        lefts, rights: numpy float64 [rows, k] and [k, columns].
    """
    import numpy as np

    # L R = Q1^T (Q1 L)(R Q2^T) Q2, with orthonormal rows Q1 and Q2 of the spaces of L^T and R
    outer, inner = _spanned(np.ascontiguousarray(lefts.T))
    right, inner_right = _spanned(np.ascontiguousarray(rights))
    if not len(outer) or not len(right):
        return None
    middle = project_rows(inner_right, inner)
    values, turns = symmetric_eigen(project_rows(middle, middle))
    values = np.maximum(values, 0.0)
    squares = float(values.sum())
    if not squares:
        return None
    turns = turns[: _rank(values, squares, cut)]
    root = values[: len(turns), None] ** 0.25
    other = combine_rows(middle, turns)
    share = min(1.0, float(np.square(other).sum()) / squares)
    left = combine_rows(outer, turns * root)
    return Factors(_plain(left.T), _plain(combine_rows(right, other / root)), share, squares)


def _spanned(rows: Any) -> tuple[Any, Any]:
    """Orthonormal rows of the same span, and the rows in their terms [k, rows]."""
    import numpy as np

    least = _SPAN_ROUNDING * np.sqrt(np.square(rows).sum(1))
    basis = orthonormalise(rows.copy(), least)
    return basis, project_rows(rows, basis)


def _on_device(matrix: Any, device: str) -> Any:
    if device == "cpu":
        return matrix
    import torch

    return torch.from_numpy(matrix).to(device)


def _krylov_size(rank: int) -> tuple[int, int]:
    """Vectors of a block, and blocks: on noise, where all directions are alike, they reach 97 % of
    what the best directions hold."""
    block = 8 if rank <= 32 else 16
    return block, (3 * max(rank, 8) + 24) // block


def _in_subspace(few: int, cut: RankTruncation) -> bool:
    """Whether a Krylov space is large enough, and much smaller than all of the directions."""
    if cut.rank is None or cut.energy is not None:
        return False
    block, blocks = _krylov_size(cut.rank)
    return _SUBSPACE_SHARE * block * blocks <= few


def _from_small_gram(matrix: Any, cut: RankTruncation, squares: float) -> tuple[Any, Any]:
    """As `_from_gram`, by compiled loops."""
    import numpy as np

    full = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = np.ascontiguousarray(full, np.float64)
    values, vectors = symmetric_eigen(project_rows(wide, wide))
    basis = vectors[: _rank(np.maximum(values, 0.0), squares, cut)]
    return basis, combine_rows(wide, basis)


def _from_gram(matrix: Any, cut: RankTruncation, squares: float) -> tuple[Any, Any]:
    """The leading left singular vectors of D that the truncation keeps, and D in their terms.

    Returns:
        numpy float64 [kept, rows] and float64 [kept, columns]: the product of the first, turned,
        and the second is the exact part of D in these directions.
    """
    import torch

    tensor = torch.as_tensor(matrix)
    full = tensor if tensor.shape[0] <= tensor.shape[1] else tensor.T
    rows = len(full)
    single = cut.energy is not None and cut.energy <= _SINGLE_ENERGY and rows > _SMALL_GRAM
    kind = torch.float32 if single else torch.float64
    gram = torch.zeros(rows, rows, dtype=kind, device=full.device)
    for part in _columns(full):
        wide = part.to(kind)
        for low in range(0, rows, _SMALL_GRAM):  # the lower half, which is all that is read
            strip = slice(low, low + _SMALL_GRAM)
            gram[strip, : low + _SMALL_GRAM] += wide[strip] @ wide[: low + _SMALL_GRAM].T
    values, vectors = torch.linalg.eigh(gram)
    values = values.double().flip(0).clamp_min(0).cpu().numpy()
    basis = vectors.flip(1)[:, : _rank(values, squares, cut)].T
    other = torch.cat([basis @ part.to(kind) for part in _columns(full)], 1)
    return basis.double().cpu().numpy(), other.double().cpu().numpy()


def _columns(full: Any) -> Any:
    """A matrix in blocks of columns."""
    return full.split(max(1, _CHUNK // len(full)), 1)


def _rank(values: Any, squares: float, cut: RankTruncation) -> int:
    """How many directions to keep of those that are not rounding; at least one.

    Args:
        values: squares of singular values, numpy float64, the largest first.
    """
    rank = max(1, int((values > _ROUNDING * values[0]).sum()))
    if cut.energy is not None:
        reached = values.cumsum() >= cut.energy * squares * (1 - 1e-12)
        rank = min(rank, int(reached.argmax()) + 1) if bool(reached.any()) else rank
    return min(rank, cut.rank) if cut.rank is not None else rank


def _plain(matrix: Any) -> Any:
    import numpy as np

    return np.ascontiguousarray(matrix, np.float32)
