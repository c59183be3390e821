"""Sums: weighted, scaled, and over runs in a written order."""

from __future__ import annotations

import numpy as np

from merge_cli.kernels.compiled.kernel import CHUNK, kernel

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
    accumulators = np.empty(_ACCUMULATORS)
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
    accumulators = np.empty(_ACCUMULATORS)
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


@kernel("void(f4[:, ::1], f4[:, ::1], f4[:, ::1])")
def low_rank_product(left, right, out):
    """out += left @ right, k after k: a product, then an addition, each rounded."""
    rank, columns = right.shape
    for i in range(len(out)):
        for begin in range(0, columns, CHUNK):
            end = min(begin + CHUNK, columns)
            total = out[i, begin:end]
            paired = rank // 2 * 2  # two at a time: half as many ways to memory
            for k in range(0, paired, 2):
                row, factor = right[k, begin:end], left[i, k]
                next_row, next_factor = right[k + 1, begin:end], left[i, k + 1]
                for j in range(end - begin):
                    total[j] = (total[j] + row[j] * factor) + next_row[j] * next_factor
            if paired < rank:
                row, factor = right[paired, begin:end], left[i, paired]
                for j in range(end - begin):
                    total[j] = total[j] + row[j] * factor
