"""Sums: weighted, scaled, and over runs in a written order."""

from __future__ import annotations

import numpy as np

from merge_cli.kernels.compiled.instructions import new_f64
from merge_cli.kernels.compiled.kernel import CHUNK, kernel

_ACCUMULATORS = 64
_COLUMNS = 512  # of a product of thin matrices, at once


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


@kernel("void(f4[:, ::1], f4[:, ::1], f4[:, ::1])")
def low_rank_product(left, right, out):
    """out += left @ right, k after k: a product, then an addition, each rounded.

    Columns are taken by so few that those of `right` stay in the cache for all rows. Eight k share
    one pass over a row: without that, loading and storing its sums takes longer than adding.
    """
    rank, columns = right.shape
    together = rank // 8 * 8
    for begin in range(0, columns, _COLUMNS):
        end = min(begin + _COLUMNS, columns)
        for i in range(len(out)):
            total, factors = out[i, begin:end], left[i]
            for k in range(0, together, 8):
                a, b, c, d = factors[k], factors[k + 1], factors[k + 2], factors[k + 3]
                e, f, g, h = factors[k + 4], factors[k + 5], factors[k + 6], factors[k + 7]
                p, q = right[k, begin:end], right[k + 1, begin:end]
                r, s = right[k + 2, begin:end], right[k + 3, begin:end]
                t, u = right[k + 4, begin:end], right[k + 5, begin:end]
                v, w = right[k + 6, begin:end], right[k + 7, begin:end]
                for j in range(len(total)):
                    x = total[j] + p[j] * a
                    x = x + q[j] * b
                    x = x + r[j] * c
                    x = x + s[j] * d
                    x = x + t[j] * e
                    x = x + u[j] * f
                    x = x + v[j] * g
                    total[j] = x + w[j] * h
            for k in range(together, rank):
                row, factor = right[k, begin:end], factors[k]
                for j in range(len(total)):
                    total[j] = total[j] + row[j] * factor
