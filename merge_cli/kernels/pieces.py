"""Many short reads of a file in one call, for rows that lie apart.

Python spends several times as long on a short read as the system does, and takes its lock for each.
"""

from __future__ import annotations

import os
from typing import Any

from merge_cli.kernels.backend import host_primitive


@host_primitive
def read_pieces(fd: int, offsets: Any, out: Any) -> int:
    """Fill each row from the bytes at its offset.

    Args:
        offsets: numpy int64 [rows].
        out: numpy uint8 [rows, bytes], filled.

    Returns:
        how many rows are filled: the next one is at a file's end, or cannot be read.
    """
    if not hasattr(os, "preadv"):
        return 0
    for number, (offset, row) in enumerate(zip(offsets.tolist(), out, strict=True)):
        if os.preadv(fd, [row.data], offset) != len(row):
            return number
    return len(out)


@read_pieces.compiled
def _read_pieces_compiled(fd: int, offsets: Any, out: Any) -> int:
    from merge_cli.kernels import compiled

    return int(compiled.read_pieces(fd, offsets, out))
