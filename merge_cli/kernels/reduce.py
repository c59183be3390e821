"""Sums that come out the same however a tensor is read.

Each run of 65,536 elements is summed by itself in float64, and the partial sums are added exactly.
Blocks are whole numbers of runs (`BLOCK_MULTIPLE`), so their size does not matter. Within a run,
element i belongs to lane i mod 64; a lane is summed in order, then the lanes are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from merge_cli.kernels.backend import Array, is_numpy, kernels_for, matrix

BLOCK_MULTIPLE = 65_536
_LANES = 64


def divided(x: Array, number: float) -> Array:
    """x / number, a true division everywhere: a GPU would multiply by 1/number given a scalar.

    x may be overwritten.
    """
    if is_numpy(x):
        x /= number
        return x
    return x / x.new_full((1,), number)


def scaled(x: Array, factor: float) -> Array:
    """x * factor, rounded once, the factor first brought to x's own precision."""
    if is_numpy(x):
        return x * x.dtype.type(factor)
    return x * x.new_full((1,), factor)


def weighted_sum(weights: Iterable[float], arrays: Sequence[Array]) -> Array:
    """sum of w * x in the given order: a product, then an addition, each rounded by itself.

    Not fused, so that vector code, its scalar tail and a GPU all round alike.
    """
    if is_numpy(arrays[0]):
        import numpy as np

        from merge_cli.kernels import compiled

        out = np.empty_like(arrays[0])
        compiled.weighted_sum(matrix(arrays), np.array([*weights], out.dtype), out)
        return out
    on_gpu = kernels_for(arrays[0])
    if on_gpu is not None:
        import torch

        return on_gpu.weighted_sum(torch.stack(list(arrays)), list(weights))
    total: Any = None
    for weight, array in zip(weights, arrays, strict=True):
        term = array * weight
        total = term if total is None else total.add_(term)
    return total


def add_scaled(base: Array, scale: float, change: Array) -> Array:
    """base + scale * change, where change may be overwritten."""
    if is_numpy(base):
        import numpy as np

        from merge_cli.kernels import compiled

        compiled.add_scaled(base, np.float32(scale), change)
        return change
    return base + scale * change


def dot_runs(a: Array, b: Array) -> list[float]:
    """The sum of a * b over each run of a flat block."""
    if is_numpy(a):
        import numpy as np

        from merge_cli.kernels import compiled

        sums = np.empty(-(-len(a) // BLOCK_MULTIPLE))
        compiled.dot_runs(a, b, BLOCK_MULTIPLE, sums)
        return list(sums.tolist())
    return [_lane_sum(a[run].double() * b[run].double()) for run in _runs(len(a))]


def absolute_runs(a: Array) -> list[float]:
    """The sum of |a| over each run of a flat block."""
    if is_numpy(a):
        import numpy as np

        from merge_cli.kernels import compiled

        sums = np.empty(-(-len(a) // BLOCK_MULTIPLE))
        compiled.absolute_runs(a, BLOCK_MULTIPLE, sums)
        return list(sums.tolist())
    return [_lane_sum(a[run].double().abs()) for run in _runs(len(a))]


def exact_sum(parts: Iterable[Iterable[float]]) -> float:
    """The sum of all partial sums, exact, so that their grouping does not matter."""
    return math.fsum(value for part in parts for value in part)


def _runs(size: int) -> list[slice]:
    return [slice(start, start + BLOCK_MULTIPLE) for start in range(0, size, BLOCK_MULTIPLE)]


def _lane_sum(values: Any) -> float:
    """The sum of float64 values in the order that the module's text gives."""
    import torch

    padded = torch.nn.functional.pad(values, (0, -len(values) % _LANES)).view(-1, _LANES)
    if values.device.type == "cpu":
        # numpy adds row by row; torch's order within a column is its own.
        total = 0.0
        for lane in padded.numpy().sum(0).tolist():  # Python's sum rounds once since 3.12
            total += lane
        return total
    return math.fsum(padded.sum(0).tolist())
