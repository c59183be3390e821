"""Counts of how sources relate, element by element: see `kernels.relate`."""

from __future__ import annotations

import numpy as np

from merge_cli.kernels.compiled.kernel import CHUNK, MAGNITUDE, U32, as_words, kernel

_EXPONENT = U32(0x7F800000)
_SEVEN = U32(7 << 23)  # bfloat16 has seven bits behind the point
# What is known of an entry, as bits of a byte: more of those are compared at once than of floats.
_LOWERED, _CHANGED, _LARGE, _STEP = map(np.uint8, range(1, 5))  # the first one is: raised
_ONE = np.uint8(1)
_U16 = np.uint16  # counts of a chunk, which are 2,048 at most


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
    facts = np.empty((sources, CHUNK), np.uint8)
    once, twice = np.empty(CHUNK, np.uint8), np.empty(CHUNK, np.uint8)
    step = np.empty(CHUNK, np.uint32)
    for begin in range(0, size, CHUNK):
        length = min(begin + CHUNK, size) - begin
        stored = as_words(rows[0, begin : begin + length])
        for i in range(length):
            exponent = stored[i] & _EXPONENT
            step[i] = exponent - _SEVEN if exponent > _SEVEN else U32(0)
        once[:] = 0
        twice[:] = 0
        for s in range(sources):
            fact, threshold = facts[s], thresholds[s]
            bits = as_words(rows[s + 1, begin : begin + length])
            for i in range(length):
                key = bits[i] & MAGNITUDE
                flags = (bits[i] >> U32(31)) + U32(5)  # changed, and raised or lowered
                flags |= U32(8) if key >= threshold else U32(0)
                flags |= U32(16) if key <= step[i] else U32(0)
                fact[i] = np.uint8(flags if key > U32(0) else U32(0))
            count, top, small = _U16(0), _U16(0), _U16(0)
            for i in range(length):
                twice[i] |= once[i] & fact[i]
                once[i] |= fact[i]
                count = _U16(count + _U16((fact[i] >> _CHANGED) & _ONE))
                top = _U16(top + _U16((fact[i] >> _LARGE) & _ONE))
                small = _U16(small + _U16((fact[i] >> _STEP) & _ONE))
            both[s, s] += count
            agree[s, s] += count
            equal[s, s] += length
            large[s, s] += top
            steps[s] += small
        shared, mixed = _U16(0), _U16(0)
        for i in range(length):
            shared = _U16(shared + _U16((twice[i] >> _CHANGED) & _ONE))
            mixed = _U16(mixed + _U16(once[i] & (once[i] >> _LOWERED) & _ONE))
        contest[0] += shared
        contest[1] += mixed
        for s in range(sources):
            for t in range(s + 1, sources):
                a, b = facts[s], facts[t]
                present, same, together = _U16(0), _U16(0), _U16(0)
                for i in range(length):
                    x = a[i] & b[i]
                    present = _U16(present + _U16((x >> _CHANGED) & _ONE))
                    same = _U16(same + _U16((x | (x >> _LOWERED)) & _ONE))
                    together = _U16(together + _U16((x >> _LARGE) & _ONE))
                first = rows[s + 1, begin : begin + length]
                second = rows[t + 1, begin : begin + length]
                alike = U32(0)
                for i in range(length):
                    alike += U32(first[i] == second[i])
                both[s, t] += present
                both[t, s] += present
                agree[s, t] += same
                agree[t, s] += same
                large[s, t] += together
                large[t, s] += together
                equal[s, t] += alike
                equal[t, s] += alike


@kernel("u4(f4[::1], i8)")
def key_of_rank(values, rank):
    """The rank-th largest key (bits of |x|), by a histogram of upper bits, then one of lower."""
    counts = np.zeros(1 << 15, np.int64)
    bits = as_words(values)
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
