"""Codes of a few bits, and the numbers that they stand for: what the storage formats share.

Every product, sum and difference is rounded by itself in float32, in the order that is written
here, so that the numbers are those of the formats' own libraries.
"""

from __future__ import annotations

from typing import Any

from merge_cli.kernels.backend import host_primitive


@host_primitive
def look_up(table: Any, codes: Any, out: Any = None) -> Any:
    """The entry of each code.

    Args:
        table: numpy float32 [256], or uint64 [256] where an entry is two numbers.
        codes: numpy uint8, of any shape.
        out: of the table's dtype and the codes' shape, contiguous; None for a new one.

    Returns:
        `out`, filled.
    """
    import numpy as np

    return np.take(table, codes, out=out)


@look_up.compiled
def _look_up_compiled(table: Any, codes: Any, out: Any = None) -> Any:
    import numpy as np

    from merge_cli.kernels import compiled

    if out is None:
        out = np.empty(codes.shape, table.dtype)
    compiled.look_up(table, np.ascontiguousarray(codes).reshape(-1), out.reshape(-1))
    return out


@host_primitive
def spread(raw: Any, bits: int, run: int = 1) -> Any:
    """Codes of each byte: of each `run` bytes all lowest bits, then all next ones.

    Args:
        raw: numpy uint8 [..., bytes], of which `run` is a divisor.
        bits: of a code: 1, 2 or 4.

    Returns:
        numpy uint8 [..., 8 * bytes // bits].
    """
    import numpy as np

    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    *outer, size = raw.shape
    codes = (raw.reshape(*outer, size // run, 1, run) >> shifts) & np.uint8((1 << bits) - 1)
    return codes.reshape(*outer, size * 8 // bits)


@spread.compiled
def _spread_compiled(raw: Any, bits: int, run: int = 1) -> Any:
    import numpy as np

    from merge_cli.kernels import compiled

    if run != 1:
        return spread.reference(raw, bits, run)
    per_byte = 8 // bits
    flat = np.ascontiguousarray(raw).reshape(-1)
    codes = np.empty(len(flat) * per_byte, np.uint8)
    compiled.spread_bytes(flat, bits, codes)
    return codes.reshape(*raw.shape[:-1], raw.shape[-1] * per_byte)


@host_primitive
def scale_groups(numbers: Any, scales: Any) -> None:
    """Multiply each group of columns with its scale.

    Args:
        numbers: numpy float32 [rows, columns], changed.
        scales: float32 [rows, groups] or [1, groups]; groups divide the columns.
    """
    rows, columns = numbers.shape
    groups = scales.shape[-1]
    numbers.reshape(rows, groups, columns // groups)[:] *= scales[:, :, None]


@scale_groups.compiled
def _scale_groups_compiled(numbers: Any, scales: Any) -> None:
    import numpy as np

    from merge_cli.kernels import compiled

    if numbers.dtype == scales.dtype == np.float32 and numbers.flags.c_contiguous:
        compiled.scale_groups(numbers, np.ascontiguousarray(scales))
    else:
        scale_groups.reference(numbers, scales)
