"""float32 to fp8 (E4M3) with a scale for each block of a matrix.

A block's scale is its largest magnitude over 448, E4M3's largest number; a code is the E4M3 number
nearest to value / scale, ties to even. Quotients are float32, so a value that lies within half a
unit of float32 of a tie may go either way. A block of zeros has scale 1. NaN and Inf do not count
for the scale, and become NaN: E4M3 has no Inf.
"""

from __future__ import annotations

from typing import Any

LARGEST = 448.0
NAN = 0x7F
# No quotient by a smaller scale would be within LARGEST.
_LEAST = 2.0**-126
_NORMAL = 2.0**-6  # from here on numbers have four digits
_SMALL = 2.0**14  # float32's last place there is E4M3's smallest number, 2^-9


def quantise(rows: Any, wide: int, codes: Any, scales: Any) -> None:
    """One row of blocks.

    Args:
        rows: numpy float32 [rows, columns], at most as many rows as a block has.
        wide: columns of a block; the last may have fewer.
        codes: numpy uint8 like `rows`, filled.
        scales: numpy float32 [blocks], filled.
    """
    from merge_cli.kernels import compiled

    if not compiled.available():
        compiled.quantise(rows, wide, codes, scales)
    else:
        _quantise(rows, wide, codes, scales)


def _quantise(rows: Any, wide: int, codes: Any, scales: Any) -> None:
    import numpy as np

    for number in range(len(scales)):
        part = rows[:, number * wide : (number + 1) * wide]
        finite = np.isfinite(part)
        largest = np.float32(np.abs(np.where(finite, part, np.float32(0))).max(initial=0))
        scale = max(largest / np.float32(LARGEST), np.float32(_LEAST)) if largest else 1.0
        scales[number] = scale
        quotient = np.minimum(np.abs(part / scales[number]), np.float32(LARGEST))
        bits = quotient.view(np.uint32)
        normal = (bits + np.uint32(0x7FFFF) + ((bits >> 20) & 1) >> 20) - (120 << 3)
        small = (quotient + np.float32(_SMALL)).view(np.uint32) - np.float32(_SMALL).view(np.uint32)
        code = np.where(quotient < _NORMAL, small, normal)
        code |= np.where(np.signbit(part), 0x80, 0).astype(np.uint32)
        codes[:, number * wide : (number + 1) * wide] = np.where(finite, code, NAN)
