"""Sums for the report: to about six digits, in whatever order is quick.

Nothing that is written into a model depends on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from merge_cli.kernels.arrays import Array, is_numpy, matrix


def squares(base: Array, merged: Array) -> tuple[float, float]:
    """sum of base^2, and of (merged - base)^2."""
    if is_numpy(base):
        from merge_cli.kernels import compiled

        found: tuple[float, float] = compiled.quick_change(base, merged)
        return found
    change = merged - base
    return float(base @ base), float(change @ change)


def add_gram(rows: Sequence[Array], total: Any, *, pairs: bool) -> None:
    """Add the dot products between rows to `total`; only those with themselves unless `pairs`."""
    if not pairs:
        for i, row in enumerate(rows):
            total[i, i] += float(row @ row)
        return
    if is_numpy(rows[0]):
        from merge_cli.kernels import compiled

        compiled.gram(matrix(rows), total)
        return
    import torch

    stacked = torch.stack(list(rows))
    total += (stacked @ stacked.T).double().cpu().numpy()


def add_signs(rows: Sequence[Array], both: Any, agree: Any) -> int:
    """Add, for each pair of rows, on how many elements both are non-zero, and where they agree.

    Returns:
        the number of elements on which some are positive and others negative.
    """
    if is_numpy(rows[0]):
        from merge_cli.kernels import compiled

        return int(compiled.count_signs(matrix(rows), both, agree))
    import torch

    sign = torch.stack(list(rows)).sign()
    present = sign.abs()
    together = (present @ present.T).round().long().cpu().numpy()
    difference = (sign @ sign.T).round().long().cpu().numpy()  # agreeing minus disagreeing
    both += together
    agree += (together + difference) // 2
    return int(((sign.amax(0) > 0) & (sign.amin(0) < 0)).sum())
