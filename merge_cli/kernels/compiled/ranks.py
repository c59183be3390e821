"""The k-th largest key of a row: three histograms of its digits, each over what is left."""

from __future__ import annotations

import numpy as np

from merge_cli.kernels.compiled.kernel import MAGNITUDE, U32, kernel

# A key has 31 bits: a first digit of 11 (exponent and three bits), then two of 10.
_FIRST, _DIGIT = U32(20), U32(10)
_FIRST_BINS, _BINS = 2**11, 2**10


@kernel("void(f4[:, ::1], i8[::1], i8[::1], i8[::1])")
def kth_largest(rows, ks, found_keys, last_kept):
    """For each row its k-th largest key, and the index up to which elements with it are kept.

    Keys that share the first digit of the one that is looked for are moved together without a
    branch, and only these are counted by their next digits: for weights a tenth of a row.
    """
    size = rows.shape[1]
    left_over = np.empty(size, np.uint32)
    counts = np.empty(_FIRST_BINS, np.int32)
    for s in range(len(rows)):
        bits = rows[s].view(np.uint32)
        counts[:] = 0
        for i in range(size):
            counts[(bits[i] & MAGNITUDE) >> _FIRST] += 1
        digit, rank = _FIRST_BINS - 1, ks[s]
        while counts[digit] < rank:
            rank -= counts[digit]
            digit -= 1
        prefix, count = U32(digit), 0
        for i in range(size):
            key = bits[i] & MAGNITUDE
            left_over[count] = key
            count += np.intp((key >> _FIRST) == prefix)
        for shift in (_DIGIT, U32(0)):
            counts[:_BINS] = 0
            for i in range(count):
                counts[(left_over[i] >> shift) & U32(_BINS - 1)] += 1
            digit = _BINS - 1
            while counts[digit] < rank:
                rank -= counts[digit]
                digit -= 1
            prefix = (prefix << _DIGIT) | U32(digit)
            same = 0
            for i in range(count):
                key = left_over[i]
                left_over[same] = key
                same += np.intp((key >> shift) == prefix)
            count = same
        found_keys[s] = prefix
        # Of `count` elements with this key `rank` are kept, the first ones.
        if rank == count:
            last_kept[s] = size - 1
            continue
        for i in range(size):
            rank -= np.intp((bits[i] & MAGNITUDE) == prefix)
            if rank == 0:
                last_kept[s] = i
                break
