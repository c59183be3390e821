"""A product of two thin matrices, added up in a written order.

Element (i, j) is the sum over k of left[i, k] * right[k, j], from k = 0 on, every product and every
sum rounded by itself in float32. So it depends on neither the rows that are asked for together nor
on a BLAS library's blocks.
"""

from __future__ import annotations

from typing import Any


def low_rank_product(left: Any, right: Any) -> Any:
    """left [n, rank] times right [rank, m], numpy float32; float32 [n, m]."""
    import numpy as np

    from merge_cli.kernels import compiled

    out = np.zeros((left.shape[0], right.shape[1]), np.float32)
    if not compiled.available():
        compiled.low_rank_product(np.ascontiguousarray(left), np.ascontiguousarray(right), out)
        return out
    for k in range(left.shape[1]):
        out += left[:, k, None] * right[None, k]
    return out
