"""Many short reads of a file: see `kernels.pieces`."""

from __future__ import annotations

from merge_cli.kernels.compiled.kernel import Foreign, kernel

pread = Foreign("pread", "int64", "int32", "uintp", "uintp", "int64")


@kernel("i8(i4, i8[::1], u1[:, ::1])")
def read_pieces(fd, offsets, out):
    """Fill rows from bytes at their offsets; how many are filled before the first that is not."""
    size = out.shape[1]
    for i in range(len(offsets)):
        if pread(fd, out[i].ctypes.data, size, offsets[i]) != size:
            return i
    return len(offsets)
