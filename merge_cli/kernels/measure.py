"""Sums for the report: to about six digits, in whatever order is quick.

Nothing that is written into a model depends on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from merge_cli.kernels.arrays import Array, is_numpy, matrix

Matrix = list[list[float]]
Counts = list[list[int]]


def dot(a: Array, b: Array) -> float:
    """sum of a * b."""
    if is_numpy(a):
        from merge_cli.kernels import compiled

        return float(compiled.quick_dot(a, b))
    return float(a @ b)


def squared_distance(a: Array, b: Array) -> float:
    """sum of (a - b)^2."""
    if is_numpy(a):
        from merge_cli.kernels import compiled

        return float(compiled.quick_distance(a, b))
    change = a - b
    return float(change @ change)


def gram(rows: Sequence[Array], *, pairs: bool) -> Matrix:
    """Dot products between rows; only those with themselves unless `pairs`."""
    if not pairs:
        squares = [dot(row, row) for row in rows]
        return [[x if i == j else 0.0 for j in range(len(rows))] for i, x in enumerate(squares)]
    if is_numpy(rows[0]):
        import numpy as np

        from merge_cli.kernels import compiled

        out = np.zeros((len(rows), len(rows)))
        compiled.gram(matrix(rows), out)
        return out.tolist()
    import torch

    stacked = torch.stack(list(rows))
    return (stacked @ stacked.T).double().tolist()


def signs(rows: Sequence[Array]) -> tuple[Counts, Counts, int]:
    """For each pair of rows, on how many elements both are non-zero, and on how many they agree.

    Returns:
        both, agree, and the number of elements on which some are positive and others negative.
    """
    if is_numpy(rows[0]):
        import numpy as np

        from merge_cli.kernels import compiled

        both = np.zeros((len(rows), len(rows)), np.int64)
        agree = np.zeros_like(both)
        conflict = compiled.count_signs(matrix(rows), both, agree)
        return both.tolist(), agree.tolist(), int(conflict)
    import torch

    sign = torch.stack(list(rows)).sign()
    present = sign.abs()
    together: Any = (present @ present.T).round().long()
    difference = (sign @ sign.T).round().long()  # agreeing minus disagreeing
    mixed = ((sign.amax(0) > 0) & (sign.amin(0) < 0)).sum()
    return together.tolist(), ((together + difference) // 2).tolist(), int(mixed)
