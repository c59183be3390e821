"""Singular values of small matrices, without a library's threads: see `kernels.singular`."""

from __future__ import annotations

import math

import numpy as np

from merge_cli.kernels.compiled.kernel import kernel

_SUMS = {"reassoc", "nsz"}
_PRECISION = 2.0**-52


@kernel("void(f8[:, ::1], f8[:, ::1])", fastmath=_SUMS)
def own_products(a, out):
    """out = a a^T."""
    for i in range(len(a)):
        for j in range(i + 1):
            total = 0.0
            for k in range(a.shape[1]):
                total += a[i, k] * a[j, k]
            out[i, j] = total
            out[j, i] = total


@kernel("void(f8[:, ::1], f8[::1], f8[::1])", fastmath=_SUMS)
def tridiagonal(s, diagonal, off_diagonal):
    """Bring a symmetric matrix to tridiagonal form by Householder reflections; `s` is used up.

    With x what stands right of the diagonal, v = x - alpha e_1 reflects it onto one axis, and
    S becomes S - v w^T - w v^T, w = p - (p.v / v.v) v, p = 2 S v / v.v.
    """
    n = len(s)
    v, w = np.empty(n), np.empty(n)
    for k in range(n - 2):
        square = 0.0
        for i in range(k + 1, n):
            v[i] = s[k, i]
            square += v[i] * v[i]
        if square == 0.0:
            off_diagonal[k] = 0.0
            continue
        alpha = -math.copysign(math.sqrt(square), v[k + 1])
        off_diagonal[k] = alpha
        length = 2.0 * (square - alpha * v[k + 1])
        v[k + 1] -= alpha
        along = 0.0
        rest_v, rest_w = v[k + 1 :], w[k + 1 :]
        for i in range(k + 1, n):
            row, total = s[i, k + 1 :], 0.0
            for j in range(len(row)):
                total += row[j] * rest_v[j]
            w[i] = 2.0 * total / length
            along += w[i] * v[i]
        for i in range(k + 1, n):
            w[i] -= along / length * v[i]
        for i in range(k + 1, n):
            row, x, y = s[i, k + 1 :], v[i], w[i]
            for j in range(len(row)):
                row[j] -= x * rest_w[j] + y * rest_v[j]
    for i in range(n):
        diagonal[i] = s[i, i]
    off_diagonal[n - 1] = 0.0
    if n > 1:
        off_diagonal[n - 2] = s[n - 2, n - 1]


@kernel("boolean(f8[::1], f8[::1])", fastmath=_SUMS)
def eigenvalues(d, e):
    """Eigenvalues of a tridiagonal matrix into its diagonal `d`; whether they were found.

    Implicit QR with Wilkinson's shift (Golub and Van Loan, Matrix Computations, section 8.3),
    exact to the precision of the largest.
    """
    largest = 0.0
    for i in range(len(d)):
        largest = max(largest, abs(d[i]) + abs(e[i]))
    tolerance = _PRECISION * largest
    high, turns = len(d) - 1, 0
    while high > 0:
        low = high
        while low > 0 and abs(e[low - 1]) > tolerance:
            low -= 1
        if low == high:
            high -= 1
            continue
        turns += 1
        if turns > 60 * len(d):
            return False
        half = (d[high - 1] - d[high]) / 2
        corner = e[high - 1]
        root = math.copysign(math.sqrt(half * half + corner * corner), half)
        x, z = d[low] - (d[high] - corner * corner / (half + root)), e[low]
        for k in range(low, high):
            length = math.sqrt(x * x + z * z)
            c, s = (x / length, z / length) if length > 0.0 else (1.0, 0.0)
            if k > low:
                e[k - 1] = length
            a, b, off = d[k], d[k + 1], e[k]
            d[k] = c * c * a + 2.0 * c * s * off + s * s * b
            d[k + 1] = s * s * a - 2.0 * c * s * off + c * c * b
            e[k] = c * s * (b - a) + (c * c - s * s) * off
            if k < high - 1:
                x, z = e[k], s * e[k + 1]
                e[k + 1] = c * e[k + 1]
    return True
