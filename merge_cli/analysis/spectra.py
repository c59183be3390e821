"""The effective rank of changes, the number of their directions, from samples of matrices.

The effective rank of a matrix with singular values σ is exp(H(p)), p = σ / Σσ, H the entropy: Roy
and Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007. It is 1 for
a matrix of rank one and n for n equal singular values. The stable rank is Σσ² / max σ².

Complete matrices would take longer than everything else together. So a few matrices of each kind
of module are chosen, and of each at most 256 rows and 256 columns, by a generator that depends only
on the seed and the tensor's name. The rank of a sample is at most its smaller side: ranks are
compared as shares of that side.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from merge_cli.analysis.measures import rounded
from merge_cli.analysis.model_set import kind_of
from merge_cli.engine.worker_context import HostWorker, WorkerContext
from merge_cli.kernels.backend import to_numpy
from merge_cli.kernels.matrices import singular_values
from merge_cli.kernels.relation_streams import Runs
from merge_cli.planning.plan import TensorTask

SIDE = 256  # rows and columns of a sample, at most
_PER_KIND = 3  # matrices of a kind
_MIN_SIDE = 16  # rows and columns of a matrix that is sampled
_WINDOW = 65_536  # columns to choose from: any worker's buffers hold them


@dataclass(frozen=True)
class Spectrum:
    """Ranks of one sampled matrix, for each source.

    Attributes:
        shape: of the complete tensor; `rows` and `columns` are the sample's.
        effective_rank, stable_rank: see the module; None where nothing changed.
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
    """A few matrices of each kind of module: those whose names hash lowest with the seed."""
    by_kind: dict[str, list[TensorTask]] = {}
    for task in tasks:
        if len(task.shape) == 2 and min(task.shape) >= _MIN_SIDE:
            by_kind.setdefault(kind_of(task.name), []).append(task)
    return [
        task
        for matrices in by_kind.values()
        for task in sorted(matrices, key=lambda task: _hash(seed, task.name))[:_PER_KIND]
    ]


def _hash(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}/{name}".encode()).digest()


def sample_positions(shape: Sequence[int], seed: int, name: str) -> tuple[list[int], list[int]]:
    """The rows and columns of a matrix that are sampled, in ascending order."""
    generator = random.Random(f"{seed}/{name}")
    rows = sorted(generator.sample(range(shape[0]), min(shape[0], SIDE)))
    width = min(shape[1], _WINDOW)
    return rows, sorted(generator.sample(range(width), min(width, SIDE)))


def spectrum_of(task: TensorTask, worker: WorkerContext, seed: int) -> Spectrum:
    """Read a sample of every source's change and measure it.

    Args:
        task: a matrix; its first operand is the base.
    """
    rows, columns = sample_positions(task.shape, seed, task.name)
    deltas = _changes(task, worker, rows, columns).astype(float)
    ranks = [_ranks(delta) for delta in deltas]
    return Spectrum(
        task.name,
        kind_of(task.name),
        tuple(task.shape),
        len(rows),
        len(columns),
        tuple(effective for effective, _, _ in ranks),
        tuple(stable for _, stable, _ in ranks),
        tuple(rank for _, _, rank in ranks),
    )


def _changes(
    task: TensorTask, worker: WorkerContext, rows: Sequence[int], columns: Sequence[int]
) -> Any:
    """Of every source, numpy [sources, rows, columns]."""
    import numpy as np

    width = min(task.shape[1], _WINDOW)
    firsts = [row * task.shape[1] for row in rows]
    if isinstance(worker, HostWorker):
        changes = worker.read_sample(task.operands, Runs(firsts, width), columns)
        if changes is not None:
            return changes

    def load(start: int, stop: int) -> list[Any]:
        loaded = worker.load(task.operands, start, stop, base=True, deltas=True)
        return [to_numpy(values) for values in loaded.operands]

    if task.size <= worker.block:  # one read, whose other rows cost less than a read of each
        chosen = np.ix_(rows, columns)
        return np.stack([v.reshape(task.shape)[chosen] for v in load(0, task.size)])
    of_rows = [[v[columns] for v in load(first, first + width)] for first in firsts]
    return np.stack([np.stack(changes) for changes in of_rows], axis=1)


def _ranks(matrix: Any) -> tuple[float | None, float | None, int | None]:
    import numpy as np

    largest = np.abs(matrix).max()
    if not largest or not np.isfinite(largest):
        return None, None, None
    values = singular_values(matrix / largest)
    squares = values * values
    share = np.cumsum(squares) / squares.sum()
    rank = int(np.searchsorted(share, 0.99)) + 1
    return rounded(effective_rank(values)), rounded(squares.sum() / squares[0]), rank


def effective_rank(singular: Any) -> float:
    """exp of the entropy of the normalised singular values (not all of them 0)."""
    import numpy as np

    shares = singular / singular.sum()
    shares = shares[shares > 0]
    return float(math.exp(-(shares * np.log(shares)).sum()))
