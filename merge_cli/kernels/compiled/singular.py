"""Eigenvalues and eigenvectors of small symmetric matrices, without a library's threads."""

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


@kernel("void(f8[:, ::1], f8[::1], f8[::1], f8[:, ::1])", fastmath=_SUMS)
def tridiagonal(s, diagonal, off_diagonal, reflectors):
    """Bring a symmetric matrix to tridiagonal form by Householder reflections; `s` is used up.

    With x what stands right of the diagonal, v = x - alpha e_1 reflects it onto one axis, and
    S becomes S - v w^T - w v^T, w = p - (p.v / v.v) v, p = 2 S v / v.v. Only the upper half is
    computed. One pass over it brings it up to date and multiplies it with the next v: the matrix
    is larger than the cache that is quick.

    Args:
        reflectors: filled with a row u for each reflection I - u u^T; no rows where nobody asks.
    """
    n = len(s)
    v, w, next_v, next_w = np.zeros(n), np.zeros(n), np.zeros(n), np.zeros(n)
    for k in range(n):
        for j in range(k, n):
            s[k, j] -= v[k] * w[j] + w[k] * v[j]
        diagonal[k] = s[k, k]
        if k >= n - 2:
            off_diagonal[k] = s[k, k + 1] if k == n - 2 else 0.0
            continue
        square = 0.0
        for i in range(k + 1, n):
            next_v[i] = s[k, i]
            square += next_v[i] * next_v[i]
        alpha = -math.copysign(math.sqrt(square), next_v[k + 1])
        off_diagonal[k] = alpha
        length = 2.0 * (square - alpha * next_v[k + 1])
        next_v[k + 1] -= alpha
        next_w[:] = 0.0
        for i in range(k + 1, n):
            row, vs, ws = s[i, i:], v[i:], w[i:]
            next_vs, next_ws = next_v[i:], next_w[i:]
            x, y, z, total = v[i], w[i], next_v[i], 0.0
            for j in range(len(row)):
                entry = row[j] - (x * ws[j] + y * vs[j])
                row[j] = entry
                total += entry * next_vs[j]
                next_ws[j] += entry * z
            next_w[i] += total - row[0] * z  # the diagonal is in both
        factor = 2.0 / length if length > 0.0 else 0.0
        if len(reflectors) > 0:
            scale, reflector = math.sqrt(factor), reflectors[k]
            for i in range(k + 1, n):
                reflector[i] = scale * next_v[i]
        along = 0.0
        for i in range(k + 1, n):
            next_w[i] *= factor
            along += next_w[i] * next_v[i]
        along *= factor / 2.0
        for i in range(k + 1, n):
            next_w[i] -= along * next_v[i]
        v, next_v, w, next_w = next_v, v, next_w, w


@kernel("boolean(f8[::1], f8[::1], f8[:, ::1])", fastmath=_SUMS)
def eigenvalues(d, e, rows):
    """Eigenvalues of a tridiagonal matrix into its diagonal `d`; whether they were found.

    Implicit QR with Wilkinson's shift (Golub and Van Loan, Matrix Computations, section 8.3),
    exact to the precision of the largest.

    Args:
        rows: are rotated with it: of a unit matrix the eigenvectors are left. They may be empty.
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
            upper, lower = rows[k], rows[k + 1]
            for j in range(len(upper)):
                p, q = upper[j], lower[j]
                upper[j] = c * p + s * q
                lower[j] = c * q - s * p
            e[k] = c * s * (b - a) + (c * c - s * s) * off
            if k < high - 1:
                x, z = e[k], s * e[k + 1]
                e[k + 1] = c * e[k + 1]
    return True


@kernel("void(f8[:, ::1], f8[:, ::1])", fastmath=_SUMS)
def reflect(rows, reflectors):
    """Turn eigenvectors of the tridiagonal form, one a row, into those of the matrix itself."""
    n = len(rows)
    for r in range(n):
        row = rows[r]
        for k in range(n - 3, -1, -1):
            x, u = row[k + 1 :], reflectors[k, k + 1 :]
            along = 0.0
            for i in range(len(x)):
                along += x[i] * u[i]
            for i in range(len(x)):
                x[i] -= along * u[i]
