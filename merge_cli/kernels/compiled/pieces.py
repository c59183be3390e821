"""Many short reads of a file: see `kernels.pieces`."""

from __future__ import annotations

from merge_cli.kernels.compiled.files import read_exactly
from merge_cli.kernels.compiled.kernel import kernel


@kernel("i8(i4, i8[::1], u1[:, ::1])")
def read_pieces(fd, offsets, out):
    """Fill rows from bytes at their offsets; how many are filled before the first that is not."""
    for i in range(len(offsets)):
        if not read_exactly(fd, offsets[i], out[i]):
            return i
    return len(offsets)
