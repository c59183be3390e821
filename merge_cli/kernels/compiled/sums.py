"""Sums: weighted, scaled, and over runs in a written order."""

from __future__ import annotations

import numpy as np

from merge_cli.kernels.compiled.arrays import copy_64, new_f32, new_f64, window
from merge_cli.kernels.compiled.kernel import CHUNK, F32, kernel

_ACCUMULATORS = 64


@kernel("void(f4[:, ::1], f4[::1], f4[::1])")
def weighted_sum(rows, weights, out):
    """out = sum of weights[s] * rows[s] in order: a product, then an addition, each rounded."""
    sources, size = rows.shape
    for begin in range(0, size, CHUNK):
        end = min(begin + CHUNK, size)
        total = out[begin:end]
        for s in range(sources):
            row, weight = rows[s, begin:end], weights[s]
            if s == 0:
                for i in range(end - begin):
                    total[i] = row[i] * weight
            else:
                for i in range(end - begin):
                    total[i] = total[i] + row[i] * weight


@kernel("void(f4[::1], f4, f4[::1])")
def add_scaled(base, scale, values):
    """values = base + scale * values: a product, then an addition, each rounded."""
    for i in range(len(values)):
        values[i] = base[i] + scale * values[i]


@kernel("void(f4[::1], f4[::1], i8, f8[::1])")
def dot_runs(a, b, run, sums):
    """sums[r] = sum of a * b over run r in float64; the accumulators are added in order."""
    accumulators = new_f64(_ACCUMULATORS)
    for r in range(len(sums)):
        x, y = a[r * run : (r + 1) * run], b[r * run : (r + 1) * run]
        accumulators[:] = 0.0
        aligned = len(x) // _ACCUMULATORS * _ACCUMULATORS
        for begin in range(0, aligned, _ACCUMULATORS):
            for j in range(_ACCUMULATORS):
                accumulators[j] += np.float64(x[begin + j]) * np.float64(y[begin + j])
        for i in range(aligned, len(x)):
            accumulators[i - aligned] += np.float64(x[i]) * np.float64(y[i])
        total = 0.0
        for j in range(_ACCUMULATORS):
            total += accumulators[j]
        sums[r] = total


@kernel("void(f4[::1], i8, f8[::1])")
def absolute_runs(a, run, sums):
    """sums[r] = sum of |a| over run r in float64; the accumulators are added in order."""
    accumulators = new_f64(_ACCUMULATORS)
    for r in range(len(sums)):
        x = a[r * run : (r + 1) * run]
        accumulators[:] = 0.0
        aligned = len(x) // _ACCUMULATORS * _ACCUMULATORS
        for begin in range(0, aligned, _ACCUMULATORS):
            for j in range(_ACCUMULATORS):
                accumulators[j] += abs(np.float64(x[begin + j]))
        for i in range(aligned, len(x)):
            accumulators[i - aligned] += abs(np.float64(x[i]))
        total = 0.0
        for j in range(_ACCUMULATORS):
            total += accumulators[j]
        sums[r] = total


@kernel("void(f4[:, ::1], f4[:, ::1], f4, f4[:, ::1])", side_by_side=True)
def add_low_rank(left, right, scale, out):
    """out += scale * (left @ right), k after k: a product, then an addition, each rounded.

    The sums of 64 columns stay in registers for all k. `right` of these columns is copied, for all
    rows: apart by a power of two its rows would push one another out of the cache.
    """
    rank, columns = right.shape
    panel, zeros = new_f32(rank * 64), new_f32(64)
    zeros[:] = F32(0)
    whole = columns // 64 * 64
    for first in range(0, whole, 64):
        for k in range(rank):
            row, packed = window(right, k * columns + first, 64), window(panel, k * 64, 64)
            for j in range(64):
                packed[j] = row[j]
        for i in range(len(out)):
            sums = copy_64(zeros, 0)
            for k in range(rank):
                row, factor = window(panel, k * 64, 64), left[i, k]
                for j in range(64):
                    sums[j] = sums[j] + row[j] * factor
            total = window(out, i * columns + first, 64)
            for j in range(64):
                total[j] = total[j] + sums[j] * scale
    for i in range(len(out)):
        for j in range(whole, columns):
            total = F32(0)
            for k in range(rank):
                total = total + right[k, j] * left[i, k]
            out[i, j] = out[i, j] + total * scale
