"""How many directions a change has: the effective rank of sampled matrices.

The effective rank of a matrix with singular values σ is exp(H(p)), p = σ / Σσ, H the entropy: Roy
and Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007. It is 1 for
a matrix of rank one and n for n equal singular values. The stable rank is Σσ² / max σ².

Whole matrices would take longer than everything else together. So a few matrices of each kind of
module are chosen, and of each at most 256 rows and 256 columns, by a generator that depends on the
seed and the tensor's name alone. A submatrix has a rank of at most its smaller side: the share of
that side is what compares.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from merge_cli.analysis.modules import kind_of
from merge_cli.engine.lanes import WorkerContext
from merge_cli.engine.plan import TensorTask
from merge_cli.kernels.arrays import is_numpy
from merge_cli.kernels.singular import singular_values

SIDE = 256  # rows and columns of a sample, at most
_EACH = 3  # matrices of a kind
_LEAST = 16  # rows and columns that are worth it
_WINDOW = 65_536  # columns to choose from: what any lane takes at once


@dataclass(frozen=True)
class Spectrum:
    """The singular values of one sampled matrix in numbers, for each source.

    Attributes:
        shape: of the whole tensor; `rows` and `columns` are the sample's.
        effective_rank, stable_rank: see above; None where nothing changed.
        rank_99: singular values that hold 99 % of the sum of squares.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    rows: int
    columns: int
    effective_rank: tuple[float | None, ...]
    stable_rank: tuple[float | None, ...]
    rank_99: tuple[int | None, ...]


def choose_tensors(tasks: Sequence[TensorTask], seed: int) -> list[TensorTask]:
    """A few matrices of every kind of module: those whose names hash lowest with the seed."""
    by_kind: dict[str, list[TensorTask]] = {}
    for task in tasks:
        if len(task.shape) == 2 and min(task.shape) >= _LEAST:
            by_kind.setdefault(kind_of(task.name), []).append(task)
    return [
        task
        for found in by_kind.values()
        for task in sorted(found, key=lambda task: _hash(seed, task.name))[:_EACH]
    ]


def _hash(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}/{name}".encode()).digest()


def sample_positions(shape: Sequence[int], seed: int, name: str) -> tuple[list[int], list[int]]:
    """The rows and columns of a matrix that are looked at, in ascending order."""
    generator = random.Random(f"{seed}/{name}")
    rows = sorted(generator.sample(range(shape[0]), min(shape[0], SIDE)))
    width = min(shape[1], _WINDOW)
    return rows, sorted(generator.sample(range(width), min(width, SIDE)))


def spectrum_of(task: TensorTask, lane: WorkerContext, seed: int) -> Spectrum:
    """Read a sample of every source's change and measure it.

    Args:
        task: a matrix; its first operand is the base.
    """
    import numpy as np

    rows, columns = sample_positions(task.shape, seed, task.name)
    width = min(task.shape[1], _WINDOW)
    deltas = np.empty((len(task.operands) - 1, len(rows), len(columns)))
    for i, row in enumerate(rows):
        start = row * task.shape[1]
        loaded = lane.load(task.operands, start, start + width, base=True, deltas=True)
        for delta, values in zip(deltas, loaded.operands, strict=True):
            delta[i] = (values if is_numpy(values) else values.cpu().numpy())[columns]
    found = [_ranks(delta) for delta in deltas]
    return Spectrum(
        task.name,
        kind_of(task.name),
        tuple(task.shape),
        len(rows),
        len(columns),
        tuple(effective for effective, _, _ in found),
        tuple(stable for _, stable, _ in found),
        tuple(rank for _, _, rank in found),
    )


def _ranks(matrix: Any) -> tuple[float | None, float | None, int | None]:
    import numpy as np

    largest = np.abs(matrix).max()
    if not largest or not np.isfinite(largest):
        return None, None, None
    values = singular_values(matrix / largest)
    squares = values * values
    share = np.cumsum(squares) / squares.sum()
    rank = int(np.searchsorted(share, 0.99)) + 1
    return _rounded(effective_rank(values)), _rounded(squares.sum() / squares[0]), rank


def effective_rank(singular: Any) -> float:
    """exp of the entropy of the normalised singular values (not all of them 0)."""
    import numpy as np

    shares = singular / singular.sum()
    shares = shares[shares > 0]
    return float(math.exp(-(shares * np.log(shares)).sum()))


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
