"""Matrices of codes that are stored the other way round: rows of the weight are stored as columns.

What is filled is any span of the numbers of a weight: `begin` numbers of the first row come before.
Every difference and product is rounded by itself in float32, in the order that is written here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from merge_cli.kernels.backend import host_primitive
from merge_cli.kernels.codes import spread

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


@host_primitive
def turned_words(
    words: Any, bits: int, zeros: Any, scales: Any, group: int, begin: int, out: Any
) -> None:
    """(code - zero) * scale of codes that lie one below the other in words of 32 bits.

    Args:
        words: numpy uint32 [columns * bits / 32, rows].
        bits: of a code: 2, 4 or 8, the first one in the lowest.
        zeros, scales: numpy float32 [rows, groups].
        group: columns of a group; the last one may have fewer.
        out: numpy float32, flat, filled.
    """
    import numpy as np

    raw = np.ascontiguousarray(words.T).view(np.uint8)
    _fill(raw if bits == 8 else spread(raw, bits), zeros, scales, group, begin, out)


@turned_words.compiled
def _turned_words_compiled(
    words: Any, bits: int, zeros: Any, scales: Any, group: int, begin: int, out: Any
) -> None:
    from merge_cli.kernels import compiled

    flat, stride = _flat(words)
    compiled.turned_words(flat, stride, len(words), bits, zeros, scales, group, begin, out)


@host_primitive
def turned_eights(
    words: Any,
    shifts: Sequence[int],
    zeros: Any,
    scales: Any,
    group: int,
    skip: int,
    begin: int,
    out: Any,
) -> None:
    """(code - zero) * scale of codes of four bits, of which a word has those of eight rows.

    Args:
        words: numpy uint32 [columns, eights of rows].
        shifts: where the code of each of eight rows begins in a word, in bits.
        skip: rows of the first eight that come before the first row.
        zeros, scales, group, out: as of `turned_words`.
    """
    import numpy as np

    codes = (words.T[:, None, :] >> np.array(shifts, np.uint32)[:, None]) & np.uint32(15)
    rows = codes.reshape(-1, len(words))[skip : skip + len(scales)]
    _fill(rows, zeros, scales, group, begin, out)


@turned_eights.compiled
def _turned_eights_compiled(
    words: Any,
    shifts: Sequence[int],
    zeros: Any,
    scales: Any,
    group: int,
    skip: int,
    begin: int,
    out: Any,
) -> None:
    import numpy as np

    from merge_cli.kernels import compiled

    bits, (flat, stride), width = np.array(shifts, np.uint32), _flat(words), len(words)
    compiled.turned_eights(flat, stride, width, bits, zeros, scales, group, skip, begin, out)


def _flat(matrix: Any) -> tuple[Any, int]:
    """A part of a matrix from its first element to its last, and how far apart its lines begin.

    Compiled loops are quicker where they know that elements of a line lie side by side.
    """
    import numpy as np

    lines, columns = matrix.shape
    if matrix.strides[1] != matrix.itemsize:
        matrix = np.ascontiguousarray(matrix)
    stride = matrix.strides[0] // matrix.itemsize
    size = (lines - 1) * stride + columns
    return np.lib.stride_tricks.as_strided(matrix, (size,), (matrix.itemsize,)), stride


def _fill(codes: Any, zeros: Any, scales: Any, group: int, begin: int, out: Any) -> None:
    import numpy as np

    number = np.arange(codes.shape[1]) // group
    numbers = (codes.astype(np.float32) - zeros[:, number]) * scales[:, number]
    out[:] = numbers.reshape(-1)[begin : begin + len(out)]


@host_primitive
def turned_fp4(
    raw: Any, exponents: Any, group: int, first: int, count: int, begin: int, out: Any
) -> None:
    """E2M1 numbers that lie one below the other in bytes, times powers of two of groups of rows.

    Args:
        raw: numpy uint8 [columns, bytes], two rows in a byte, the first in the lower four bits. Of
            an odd `first` the row before it is in it, too.
        exponents: numpy uint8 [columns, groups] (E8M0), of the groups that the rows lie in.
        first, count: the rows.
        out: numpy float32, flat, filled.
    """
    import numpy as np

    turned = spread(np.ascontiguousarray(raw.T), 4, len(raw)).reshape(-1, len(raw))
    codes = turned[first % 2 :][:count]
    number = (first + np.arange(count)) // group - first // group
    powers = np.append(np.ldexp(np.float32(1), np.arange(255) - 127), np.float32("nan"))
    numbers = np.array(_E2M1, np.float32)[codes] * powers[exponents.T[number]]
    out[:] = numbers.reshape(-1)[begin : begin + len(out)]


@turned_fp4.compiled
def _turned_fp4_compiled(
    raw: Any, exponents: Any, group: int, first: int, count: int, begin: int, out: Any
) -> None:
    from merge_cli.kernels import compiled

    flat, stride = _flat(raw)
    compiled.turned_fp4(flat, stride, *raw.shape, exponents, group, first, count, begin, out)
