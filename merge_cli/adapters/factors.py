"""Low-rank factors of matrices: truncated singular value decompositions, in several threads.

The truncation is the best approximation of its rank (Eckart and Young, "The approximation of one
matrix by another of lower rank", Psychometrika 1936). It is computed in one of two ways:

    exact     the eigenvectors of the smaller Gram matrix, D D^T = U S^2 U^T. In float64 rounding is
              1e-8 of the largest singular value, less than float32 weights hold. In float32 it is
              3e-4, and enough for an energy: what stands out of the rest that is cut off is larger
    subspace  where few directions of many are needed: those that a few products of D D^T with
              random vectors span (block Krylov: Musco and Musco, arXiv:1504.05477), in float32

The share of the matrix that the product holds is measured, not estimated.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from merge_cli.system.machine import free_memory, usable_cores

# Of the largest eigenvalue: anything smaller is rounding.
_ROUNDING, _SINGLE_ROUNDING = 1e-14, 1e-12
_LEAST_START = 8  # random vectors
_MANY, _PRODUCTS, _FEWER_PRODUCTS = 32, 4, 3  # products with D D^T, and of many vectors
_SUBSPACE_SHARE = 2  # the subspace is used where it has at most one in two of all directions
_SINGLE_ENERGY = 0.99  # up to here an energy is cut in float32
_CHUNK = 2**21  # elements of the matrix that are held in float64 at once
_CACHED = 2**15  # and those that are squared at once
_GRAM_ROWS = 256
_MEMORY_SHARE = 0.5  # of the free memory
T = TypeVar("T")
R = TypeVar("R")


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


def factorise(matrix: Any, cut: RankTruncation, device: str = "cpu") -> Factors | None:
    """B = U sqrt(S) and A = sqrt(S) V^T of a matrix; None of one that is zero.

    Args:
        matrix: numpy float32 [rows, columns].
        device: torch's name of the device to compute on.
    """
    import torch

    tensor = torch.from_numpy(matrix).to(device)
    squares = sum_of_squares(tensor)
    if not squares:
        return None
    tall = tensor.shape[0] > tensor.shape[1]
    full = tensor.T if tall else tensor  # from here on no more rows than columns
    count = max(cut.rank or 0, _LEAST_START)
    products = _PRODUCTS if count < _MANY else _FEWER_PRODUCTS
    if cut.energy is None and _SUBSPACE_SHARE * count * (products + 1) <= len(full):
        basis, other = _from_subspace(full, count, products, cut)
    else:
        basis, other = _from_gram(full, cut, squares)
    share = min(1.0, sum_of_squares(other) / squares)
    root = other.norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny).sqrt()
    factors = Factors(_plain(basis * root), _plain(other / root[:, None]), share, squares)
    return factors.transposed if tall else factors


def recombine(lefts: Any, rights: Any, cut: RankTruncation) -> Factors | None:
    """Truncate the product of two thin matrices without computing it.

    Args:
        lefts, rights: numpy float64 [rows, k] and [k, columns].
    """
    import torch

    outer, inner = torch.linalg.qr(torch.from_numpy(lefts))
    right, inner_right = torch.linalg.qr(torch.from_numpy(rights).T)
    u, values, v = torch.linalg.svd(inner @ inner_right.T)
    squares = float(values.square().sum())
    if not squares:
        return None
    rank = _rank(values.square(), squares, cut)
    root = values[:rank].sqrt()
    share = min(1.0, float(values[:rank].square().sum()) / squares)
    left = outer @ (u[:, :rank] * root)
    return Factors(_plain(left), _plain((right @ (v[:rank].T * root)).T), share, squares)


def sum_of_squares(matrix: Any) -> float:
    """Of a tensor, in float64, by parts that stay in the cache."""
    total = 0.0
    for part in matrix.reshape(-1).split(_CACHED):
        wide = part.double()
        total = total + wide @ wide
    return float(total)


def _from_gram(full: Any, cut: RankTruncation, squares: float) -> tuple[Any, Any]:
    """The leading left singular vectors that the truncation keeps, and the matrix in their terms.

    Returns:
        float64 [rows, kept] and [kept, columns]: the product is the matrix's exact part in these
        directions.
    """
    import torch

    rows = len(full)
    single = cut.energy is not None and cut.energy <= _SINGLE_ENERGY and rows > _GRAM_ROWS
    kind = torch.float32 if single else torch.float64
    gram = torch.zeros(rows, rows, dtype=kind, device=full.device)
    for part in _columns(full):
        wide = part.to(kind)
        for low in range(0, rows, _GRAM_ROWS):  # the lower half, which is all that is read
            strip = slice(low, low + _GRAM_ROWS)
            gram[strip, : low + _GRAM_ROWS] += wide[strip] @ wide[: low + _GRAM_ROWS].T
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.double().flip(0).clamp_min(0), vectors.flip(1)
    basis = vectors[:, : _rank(values, squares, cut)]
    other = torch.cat([basis.T @ part.to(kind) for part in _columns(full)], 1)
    return basis.double(), other.double()


def _from_subspace(full: Any, count: int, products: int, cut: RankTruncation) -> tuple[Any, Any]:
    """As `_from_gram`, the vectors nearly the leading ones.

    Args:
        count: of random vectors.
        products: with D D^T, one after another.
    """
    import torch

    generator = torch.Generator().manual_seed(0)  # on the CPU: the same on every device
    start = torch.randn(full.shape[1], count, generator=generator).to(full)
    blocks = [torch.linalg.qr(full @ start)[0]]
    for _ in range(products):
        blocks.append(torch.linalg.qr(full @ (full.T @ blocks[-1]))[0])
    basis = torch.linalg.qr(torch.cat(blocks, 1))[0]
    inside = (basis.T @ full).double()
    values, vectors = torch.linalg.eigh(inside @ inside.T)
    values, vectors = values.flip(0), vectors.flip(1)
    vectors = vectors[:, values > _SINGLE_ROUNDING * values[0]][:, : cut.rank]
    return basis.double() @ vectors, vectors.T @ inside


def _columns(full: Any) -> Any:
    """A matrix in blocks of columns."""
    return full.split(max(1, _CHUNK // len(full)), 1)


def _rank(values: Any, squares: float, cut: RankTruncation) -> int:
    """How many directions to keep of those that are not rounding; at least one."""
    rank = max(1, int((values > _ROUNDING * values[0]).sum()))
    if cut.energy is not None:
        reached = values.cumsum(0) >= cut.energy * squares * (1 - 1e-12)
        rank = min(rank, int(reached.to(int).argmax()) + 1) if bool(reached.any()) else rank
    return min(rank, cut.rank) if cut.rank is not None else rank


def _plain(matrix: Any) -> Any:
    import numpy as np
    import torch

    if isinstance(matrix, torch.Tensor):
        matrix = matrix.to("cpu", torch.float32).numpy()
    return np.ascontiguousarray(matrix)


def threads_for(shapes: Iterable[Sequence[int]], requested: int | None = None) -> int:
    """How many threads can each decompose the largest matrix, at most one for each core.

    Args:
        shapes: of the matrices [rows, columns].
        requested: threads, instead of one for each core.
    """
    # The matrix and what it is made of in float32; its Gram matrix, vectors and workspace in
    # float64.
    bytes_each = max(
        (8 * rows * columns + 32 * min(rows, columns) ** 2 for rows, columns in shapes), default=1
    )
    fitting = int(free_memory() * _MEMORY_SHARE) // bytes_each
    return max(1, min(requested or usable_cores(), fitting))


@contextmanager
def in_threads(
    work: Callable[[T], R], items: Iterable[T], count: int
) -> Iterator[Iterator[tuple[T, R]]]:
    """Pairs of an item and its result, in order; only a few results wait to be taken.

    Leaving early lets the threads finish their current items.
    """
    pool = ThreadPoolExecutor(count)

    def pairs() -> Iterator[tuple[T, R]]:
        waiting: deque[tuple[T, Future[R]]] = deque()
        for item in items:
            waiting.append((item, pool.submit(work, item)))
            if len(waiting) > 2 * count:
                first, future = waiting.popleft()
                yield first, future.result()
        for first, future in waiting:
            yield first, future.result()

    try:
        yield pairs()
    finally:
        pool.shutdown(cancel_futures=True)
