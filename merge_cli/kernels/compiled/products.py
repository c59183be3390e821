"""Products of a large matrix with few vectors, each pass reading the matrix once.

A product with a few vectors is bound by reading the matrix. So four of its rows meet four vectors
at once, in registers, and a product with D D^T takes D by blocks that stay in the cache between the
two halves. Sums are taken in whatever order is quick; it does not depend on threads.
"""

from __future__ import annotations

import numpy as np

from merge_cli.kernels.compiled.kernel import kernel
from merge_cli.kernels.compiled.parts import part

_SUMS = {"reassoc", "nsz", "contract"}
_COLUMNS = 1024  # of the matrix, between the two halves of a product with D D^T
_ROWS = 128  # and rows


@part(fastmath=_SUMS)
def combine(matrix, vectors, out, top, bottom, left, right):
    """Add sums of rows top <= i < bottom, vectors[k, i - top] * matrix[i, left:right], to out[k].

    The number of vectors is a multiple of four.
    """
    whole = top + (bottom - top) // 4 * 4
    for i in range(top, whole, 4):
        p, q = matrix[i, left:right], matrix[i + 1, left:right]
        r, s = matrix[i + 2, left:right], matrix[i + 3, left:right]
        at = i - top
        for k in range(0, len(vectors), 4):
            a, b, c, d = vectors[k], vectors[k + 1], vectors[k + 2], vectors[k + 3]
            a0, a1, a2, a3 = a[at], a[at + 1], a[at + 2], a[at + 3]
            b0, b1, b2, b3 = b[at], b[at + 1], b[at + 2], b[at + 3]
            c0, c1, c2, c3 = c[at], c[at + 1], c[at + 2], c[at + 3]
            d0, d1, d2, d3 = d[at], d[at + 1], d[at + 2], d[at + 3]
            sum_a, sum_b, sum_c, sum_d = out[k], out[k + 1], out[k + 2], out[k + 3]
            for j in range(len(p)):
                w, x, y, z = p[j], q[j], r[j], s[j]
                sum_a[j] += w * a0 + x * a1 + y * a2 + z * a3
                sum_b[j] += w * b0 + x * b1 + y * b2 + z * b3
                sum_c[j] += w * c0 + x * c1 + y * c2 + z * c3
                sum_d[j] += w * d0 + x * d1 + y * d2 + z * d3
    for i in range(whole, bottom):
        p = matrix[i, left:right]
        for k in range(len(vectors)):
            factor, total = vectors[k, i - top], out[k]
            for j in range(len(p)):
                total[j] += p[j] * factor


@part(fastmath=_SUMS)
def project(matrix, vectors, out, top, bottom, left, right):
    """out[k, i - top] += the dot product of matrix[i, left:right] and vectors[k].

    The number of vectors is even.
    """
    zero = matrix.dtype.type(0)
    whole = top + (bottom - top) // 4 * 4
    for i in range(top, whole, 4):
        p, q = matrix[i, left:right], matrix[i + 1, left:right]
        r, s = matrix[i + 2, left:right], matrix[i + 3, left:right]
        at = i - top
        for k in range(0, len(vectors), 2):
            a, b = vectors[k], vectors[k + 1]
            a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = zero
            for j in range(len(p)):
                w, x, y, z = p[j], q[j], r[j], s[j]
                e, f = a[j], b[j]
                a0 += w * e
                a1 += x * e
                a2 += y * e
                a3 += z * e
                b0 += w * f
                b1 += x * f
                b2 += y * f
                b3 += z * f
            sum_a, sum_b = out[k], out[k + 1]
            sum_a[at] += a0
            sum_a[at + 1] += a1
            sum_a[at + 2] += a2
            sum_a[at + 3] += a3
            sum_b[at] += b0
            sum_b[at + 1] += b1
            sum_b[at + 2] += b2
            sum_b[at + 3] += b3
    for i in range(whole, bottom):
        p = matrix[i, left:right]
        for k in range(len(vectors)):
            vector, total = vectors[k], zero
            for j in range(len(p)):
                total += p[j] * vector[j]
            out[k, i - top] += total


@kernel(
    ["void(f4[:, ::1], f4[:, ::1], f4[:, ::1])", "void(f8[:, ::1], f8[:, ::1], f8[:, ::1])"],
    fastmath=_SUMS,
)
def combine_rows(matrix, vectors, out):
    """out = vectors matrix; the number of vectors is a multiple of four."""
    rows, columns = matrix.shape
    for left in range(0, columns, _COLUMNS):
        right = min(left + _COLUMNS, columns)
        products = np.zeros((len(vectors), right - left), out.dtype)
        combine(matrix, vectors, products, 0, rows, left, right)
        out[:, left:right] = products


@kernel(
    ["void(f4[:, ::1], f4[:, ::1], f8[:, ::1])", "void(f8[:, ::1], f8[:, ::1], f8[:, ::1])"],
    fastmath=_SUMS,
)
def project_rows(matrix, vectors, out):
    """out = vectors matrix^T; the number of vectors is even.

    Products of float32 are added up in float32 over a block of columns, and the blocks in float64.
    """
    rows, columns = matrix.shape
    out[:] = 0.0
    for left in range(0, columns, _COLUMNS):
        right = min(left + _COLUMNS, columns)
        project(matrix, vectors[:, left:right].copy(), out, 0, rows, left, right)


@kernel("void(f4[:, ::1], f4[:, ::1], f4[:, ::1], f8[:, ::1])", fastmath=_SUMS)
def gram_product(matrix, vectors, middle, out):
    """middle = vectors D and out = vectors D D^T, D being the matrix, or its transpose if that has
    fewer rows; the number of vectors is a multiple of four."""
    rows, columns = matrix.shape
    out[:] = 0.0
    if rows <= columns:
        for left in range(0, columns, _COLUMNS):
            right = min(left + _COLUMNS, columns)
            between = np.zeros((len(vectors), right - left), np.float32)
            combine(matrix, vectors, between, 0, rows, left, right)
            middle[:, left:right] = between
            project(matrix, between, out, 0, rows, left, right)
    else:
        for top in range(0, rows, _ROWS):
            bottom = min(top + _ROWS, rows)
            between = np.zeros((len(vectors), bottom - top), np.float32)
            project(matrix, vectors, between, top, bottom, 0, columns)
            middle[:, top:bottom] = between
            products = np.zeros((len(vectors), columns), np.float32)
            combine(matrix, between, products, top, bottom, 0, columns)
            out += products


@kernel("i8(f8[:, ::1], f8[::1])", fastmath=_SUMS)
def orthonormalise(rows, least):
    """Make rows orthonormal, one after another, and move them to the front.

    A row is dropped if no more than the length least[r] of it is left.

    Returns:
        how many there are.
    """
    count = 0
    for r in range(len(rows)):
        row, target, after = rows[r], rows[count], 0.0
        for _ in range(2):  # the second time removes what rounding left of the first
            for k in range(count):
                other, along = rows[k], 0.0
                for j in range(len(row)):
                    along += row[j] * other[j]
                for j in range(len(row)):
                    row[j] -= along * other[j]
        for j in range(len(row)):
            after += row[j] * row[j]
        if after <= least[r] * least[r]:
            continue
        scale = 1.0 / np.sqrt(after)
        for j in range(len(row)):
            target[j] = scale * row[j]
        count += 1
    return count
