"""Counts of how sources relate, element by element: see `kernels.relate`."""

from __future__ import annotations

import numpy as np

from merge_cli.kernels.compiled.kernel import CHUNK, MAGNITUDE, U32, kernel

_EXPONENT = U32(0x7F800000)
_SEVEN = U32(7 << 23)  # bfloat16 has seven bits behind the point


@kernel(
    "void(f4[:, ::1], u4[::1], i8[:, ::1], i8[:, ::1], i8[:, ::1], i8[:, ::1], i8[::1], i8[::1])"
)
def count_relations(rows, thresholds, both, agree, equal, large, steps, contest):
    """Add the counts of a block whose first row is the base and whose others are deltas.

    Args:
        thresholds: keys (bits of |x|) from which on an entry is one of its source's largest.
        contest: elements that two sources change or more, and those of them in conflict.
    """
    sources, size = len(rows) - 1, rows.shape[1]
    signs = np.empty((sources, CHUNK), np.int32)
    tops = np.empty((sources, CHUNK), np.int32)
    changed, balance = np.empty(CHUNK, np.int32), np.empty(CHUNK, np.int32)
    step = np.empty(CHUNK, np.uint32)
    for begin in range(0, size, CHUNK):
        length = min(begin + CHUNK, size) - begin
        stored = rows[0, begin : begin + length].view(np.uint32)
        for i in range(length):
            exponent = stored[i] & _EXPONENT
            step[i] = exponent - _SEVEN if exponent > _SEVEN else U32(0)
        changed[:] = 0
        balance[:] = 0
        for s in range(sources):
            row, sign, top = rows[s + 1, begin : begin + length], signs[s], tops[s]
            bits, threshold, small = row.view(np.uint32), thresholds[s], np.int32(0)
            for i in range(length):
                key = bits[i] & MAGNITUDE
                sign_i = np.int32(row[i] > 0) - np.int32(row[i] < 0)
                sign[i] = sign_i
                changed[i] += sign_i * sign_i
                balance[i] += sign_i
                top[i] = np.int32(key >= threshold)
                small += np.int32((key <= step[i]) & (key > U32(0)))
            steps[s] += small
        shared, mixed = np.int32(0), np.int32(0)
        for i in range(length):
            several = np.int32(changed[i] > 1)
            shared += several
            mixed += several & np.int32(abs(balance[i]) != changed[i])
        contest[0] += shared
        contest[1] += mixed
        for s in range(sources):
            for t in range(s, sources):
                a, b, x, y = signs[s], signs[t], tops[s], tops[t]
                present, product, together = np.int32(0), np.int32(0), np.int32(0)
                for i in range(length):
                    p = a[i] * b[i]
                    product += p
                    present += p * p
                    together += x[i] & y[i]
                first = rows[s + 1, begin : begin + length]
                second = rows[t + 1, begin : begin + length]
                alike = np.int32(0)
                for i in range(length):
                    alike += np.int32(first[i] == second[i])
                same = (present + product) // 2
                both[s, t] += present
                agree[s, t] += same
                large[s, t] += together
                equal[s, t] += alike
                if s != t:
                    both[t, s] += present
                    agree[t, s] += same
                    large[t, s] += together
                    equal[t, s] += alike


@kernel("u4(f4[::1], i8)")
def key_of_rank(values, rank):
    """The rank-th largest key (bits of |x|), by a histogram of upper bits, then one of lower."""
    counts = np.zeros(1 << 15, np.int64)
    bits = values.view(np.uint32)
    for i in range(len(bits)):
        counts[(bits[i] & MAGNITUDE) >> U32(16)] += 1
    upper, above = len(counts) - 1, 0
    while above + counts[upper] < rank:
        above += counts[upper]
        upper -= 1
    counts = np.zeros(1 << 16, np.int64)
    for i in range(len(bits)):
        key = bits[i] & MAGNITUDE
        if key >> U32(16) == upper:
            counts[key & U32(0xFFFF)] += 1
    lower = len(counts) - 1
    while above + counts[lower] < rank:
        above += counts[lower]
        lower -= 1
    return (U32(upper) << U32(16)) | U32(lower)
