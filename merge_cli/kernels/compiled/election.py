"""Sign election: see `kernels.elect`."""

from __future__ import annotations

import numpy as np

from merge_cli.kernels.compiled.kernel import CHUNK, F32, kernel

NOTHING, WEIGHTS, COUNT = 0, 1, 2


@kernel("void(f4[:, ::1], f4[::1], boolean, i8, f4, f4, f4[::1])")
def disjoint_mean(rows, weights, weighted, divide_by, zero_sign, least_divisor, out):
    """See `kernels.elect.disjoint_mean`, whose operations these are, one by one.

    `least_divisor` is 0 where there is none.
    """
    sources, size = rows.shape
    elected = np.empty(CHUNK, np.float32)
    divisor = np.empty(CHUNK, np.float32)
    unit_vote = F32(1.0)
    for begin in range(0, size, CHUNK):
        end = min(begin + CHUNK, size)
        length = end - begin
        total = out[begin:end]
        for s in range(sources):
            row = rows[s, begin:end]
            vote = weights[s] if weighted else unit_vote
            if s == 0:
                for i in range(length):
                    elected[i] = row[i] * vote
            else:
                for i in range(length):
                    elected[i] = elected[i] + row[i] * vote
        for i in range(length):
            sign = zero_sign
            sign = unit_vote if elected[i] > 0 else sign
            sign = -unit_vote if elected[i] < 0 else sign
            elected[i] = sign
        total[:] = 0
        divisor[:] = 0
        for s in range(sources):
            row, weight = rows[s, begin:end], weights[s]
            vote = weight if weighted else unit_vote
            share = unit_vote if divide_by == COUNT else weight
            if divide_by == NOTHING:
                for i in range(length):
                    agrees = (row[i] * vote) * elected[i] > 0
                    total[i] = total[i] + (row[i] * weight if agrees else F32(0.0))
            else:
                for i in range(length):
                    agrees = (row[i] * vote) * elected[i] > 0
                    total[i] = total[i] + (row[i] * weight if agrees else F32(0.0))
                    divisor[i] = divisor[i] + (share if agrees else F32(0.0))
        if divide_by == NOTHING:
            continue
        if least_divisor > 0:
            for i in range(length):
                safe = least_divisor if divisor[i] < least_divisor else divisor[i]
                total[i] = total[i] / safe
        else:
            for i in range(length):
                safe = unit_vote if abs(divisor[i]) < F32(1e-8) else divisor[i]
                total[i] = total[i] / safe
