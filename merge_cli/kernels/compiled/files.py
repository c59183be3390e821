"""Reads and writes inside compiled loops, which hold Python's lock for none of them.

Whatever goes wrong (the end of a file, a full disk, a signal) is only said: Python then does the
same read or write once more, and finds the words for it.
"""

from __future__ import annotations

import numpy as np

from merge_cli.kernels.compiled.kernel import CFunction, part

_pread = CFunction("pread", "i8(i4, u8, u8, i8)")
_pwrite = CFunction("pwrite", "i8(i4, u8, u8, i8)")
_clock_gettime = CFunction("clock_gettime", "i4(i4, u8)")


@part()
def read_exactly(file, offset, buffer):
    """Fill `buffer` (bytes) from a file's bytes at `offset`; whether that was possible."""
    done = 0
    while done < len(buffer):
        rest = buffer[done:]
        count = _pread(np.int32(file), np.uint64(rest.ctypes.data), len(rest), offset + done)
        if count <= 0:
            return False
        done += count
    return True


@part()
def write_exactly(file, offset, data):
    """Write all of `data` (bytes) at `offset`; whether that was possible."""
    done = 0
    while done < len(data):
        rest = data[done:]
        count = _pwrite(np.int32(file), np.uint64(rest.ctypes.data), len(rest), offset + done)
        if count <= 0:
            return False
        done += count
    return True


@part()
def seconds_by(clock, time):
    """What a clock of the system says, in seconds.

    Args:
        clock: its number, as `time.CLOCK_MONOTONIC` has it.
        time: int64 [2], scratch.
    """
    _clock_gettime(np.int32(clock), np.uint64(time.ctypes.data))
    return time[0] + 1e-9 * time[1]
