"""Reads and writes inside compiled loops, which hold Python's lock for none of them.

Whatever goes wrong (the end of a file, a full disk, a signal) is only said: Python then does the
same read or write once more, and finds the words for it.
"""

from __future__ import annotations

import numpy as np

from merge_cli.kernels.compiled.arrays import new_i64
from merge_cli.kernels.compiled.instructions import CFunction
from merge_cli.kernels.compiled.parts import part
from merge_cli.kernels.compiled.tiles import FLOAT32

# The columns of `inputs`: an open file, the byte at which a tensor begins, how it is encoded.
FILE, OFFSET, KIND = 0, 1, 2
_ALIGNED = 64  # bytes: of a vector, and of a float32

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


@part()
def width_of(kind):
    """Bytes of an element."""
    return 4 if kind == FLOAT32 else 2


@part()
def layout(inputs, size, starts, kinds):
    """Where each input's bytes begin in the buffer, for blocks of `size`; and where these end."""
    first = 0
    for i in range(len(inputs)):
        kinds[i], starts[i] = inputs[i, KIND], first
        first += -(-size * width_of(kinds[i]) // _ALIGNED) * _ALIGNED
    return first


@part()
def load_block(inputs, begin, length, buffer, starts, kinds, clock, spent):
    """Read elements [begin, begin + length) of every input; whether that was possible."""
    time = new_i64(2)
    began = seconds_by(clock, time)
    for i in range(len(inputs)):
        size = length * width_of(kinds[i])
        offset = inputs[i, OFFSET] + begin * width_of(kinds[i])
        if not read_exactly(inputs[i, FILE], offset, buffer[starts[i] : starts[i] + size]):
            return False
        spent[2] += size
    spent[0] += seconds_by(clock, time) - began
    return True
