"""The exact k-th largest magnitude of rows that are in memory whole: no sample, no second read.

`select` searches streams of any size; a small tensor is one block, which is ranked here. See `keys`
for why magnitudes are compared as integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from merge_cli.kernels.backend import host_primitive, matrix
from merge_cli.kernels.keys import keys


def kth_largest(rows: Sequence[Any], ks: Sequence[int]) -> list[tuple[int, int]]:
    """For each row its k-th largest key, and the index of the last element that is kept.

    Args:
        rows: equally long, flat numpy arrays of one dtype, float32 or float64.
        ks: how many elements of each row are kept, from 1 to all.

    Returns:
        for each row (key, index): kept are the elements with larger keys, and of those with this
        key the ones up to the index, so that lower indexes win; all of them up to the row's end.
    """
    return _float32_ranks(rows, ks) if rows[0].itemsize == 4 else _sorted_ranks(rows, ks)


def _sorted_ranks(rows: Sequence[Any], ks: Sequence[int]) -> list[tuple[int, int]]:
    import numpy as np

    ranks = []
    for row, k in zip(rows, ks, strict=True):
        row_keys = keys(row)
        ordered = np.sort(row_keys)  # numpy sorts integers faster than it selects one of them
        key = ordered[len(ordered) - k]
        above = len(ordered) - int(np.searchsorted(ordered, key, side="right"))
        equal = np.flatnonzero(row_keys == key)
        all_kept = k - above == len(equal)
        ranks.append((int(key), len(row) - 1 if all_kept else int(equal[k - above - 1])))
    return ranks


@host_primitive
def _float32_ranks(rows: Sequence[Any], ks: Sequence[int]) -> list[tuple[int, int]]:
    return _sorted_ranks(rows, ks)


@_float32_ranks.compiled
def _float32_ranks_compiled(rows: Sequence[Any], ks: Sequence[int]) -> list[tuple[int, int]]:
    import numpy as np

    from merge_cli.kernels import compiled

    ranks = np.empty((2, len(rows)), np.int64)
    compiled.kth_largest(matrix(rows), np.array(ks, np.int64), ranks[0], ranks[1])
    return list(zip(*ranks.tolist(), strict=True))
