"""Weighted sums of arrays, and sums over arrays that come out the same however these are read.

A sum over a tensor must not depend on blocks, threads or the device. So each run of 65,536 elements
is summed by itself in float64, and the partial sums are added exactly (`exact_sum`). Blocks are
whole numbers of runs (`BLOCK_MULTIPLE`), so their size does not matter.

Within a run the order is fixed, too: element i belongs to accumulator i mod 64; each accumulator
adds its elements in order, then the accumulators are added in order. A single running sum would be
one chain of dependent additions; 64 independent ones are a CPU's vectors, or torch's columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from merge_cli.kernels.backend import Array, matrix, primitive

BLOCK_MULTIPLE = 65_536
_ACCUMULATORS = 64


@primitive()
def divided(x: Array, number: float) -> Array:
    """x / number, a true division everywhere; x may be overwritten."""
    return x / x.new_full((1,), number)  # a GPU multiplies by 1/number given a Python number


@divided.compiled
def _divided_numpy(x: Array, number: float) -> Array:
    x /= number
    return x


@primitive()
def scaled(x: Array, factor: float) -> Array:
    """x * factor, rounded once, the factor first brought to x's own precision."""
    return x * x.new_full((1,), factor)


@scaled.compiled
def _scaled_numpy(x: Array, factor: float) -> Array:
    return x * x.dtype.type(factor)


@primitive(position=1)
def weighted_sum(weights: Iterable[float], arrays: Sequence[Array]) -> Array:
    """sum of w * x in the given order: a product, then an addition, each rounded by itself.

    Not fused, so that vector code, its scalar tail and a GPU all round alike.
    """
    total: Any = None
    for weight, array in zip(weights, arrays, strict=True):
        term = array * weight
        total = term if total is None else total.add_(term)
    return total


@weighted_sum.compiled
def _weighted_sum_compiled(weights: Iterable[float], arrays: Sequence[Array]) -> Array:
    import numpy as np

    from merge_cli.kernels import compiled

    out = np.empty_like(arrays[0])
    compiled.weighted_sum(matrix(arrays), np.array([*weights], out.dtype), out)
    return out


@weighted_sum.triton
def _weighted_sum_triton(weights: Iterable[float], arrays: Sequence[Array]) -> Array:
    import torch

    from merge_cli.kernels import triton_kernels

    return triton_kernels.weighted_sum(torch.stack(list(arrays)), list(weights))


@primitive()
def add_scaled(base: Array, scale: float, change: Array) -> Array:
    """base + scale * change, where change may be overwritten."""
    return base + scale * change


@add_scaled.compiled
def _add_scaled_compiled(base: Array, scale: float, change: Array) -> Array:
    import numpy as np

    from merge_cli.kernels import compiled

    compiled.add_scaled(base, np.float32(scale), change)
    return change


@primitive()
def dot_runs(a: Array, b: Array) -> list[float]:
    """The sum of a * b over each run of a flat block."""
    return [_run_sum(a[run].double() * b[run].double()) for run in _runs(len(a))]


@dot_runs.compiled
def _dot_runs_compiled(a: Array, b: Array) -> list[float]:
    import numpy as np

    from merge_cli.kernels import compiled

    sums = np.empty(-(-len(a) // BLOCK_MULTIPLE))
    compiled.dot_runs(a, b, BLOCK_MULTIPLE, sums)
    return list(sums.tolist())


@primitive()
def absolute_runs(a: Array) -> list[float]:
    """The sum of |a| over each run of a flat block."""
    return [_run_sum(a[run].double().abs()) for run in _runs(len(a))]


@absolute_runs.compiled
def _absolute_runs_compiled(a: Array) -> list[float]:
    import numpy as np

    from merge_cli.kernels import compiled

    sums = np.empty(-(-len(a) // BLOCK_MULTIPLE))
    compiled.absolute_runs(a, BLOCK_MULTIPLE, sums)
    return list(sums.tolist())


def exact_sum(parts: Iterable[Iterable[float]]) -> float:
    """The sum of all partial sums, exact, so that their grouping does not matter."""
    return math.fsum(value for part in parts for value in part)


def _runs(size: int) -> list[slice]:
    return [slice(start, start + BLOCK_MULTIPLE) for start in range(0, size, BLOCK_MULTIPLE)]


def _run_sum(values: Any) -> float:
    """The sum of a run's float64 values in the order that the module's text gives."""
    import torch

    padding = (0, -len(values) % _ACCUMULATORS)  # zeros change no sum
    rows = torch.nn.functional.pad(values, padding).view(-1, _ACCUMULATORS)
    if values.device.type == "cpu":
        # numpy adds row by row, which is the order; torch splits a column as it sees fit.
        total = 0.0
        for accumulator in rows.numpy().sum(0).tolist():  # Python's sum rounds once since 3.12
            total += accumulator
        return total
    return math.fsum(rows.sum(0).tolist())
