"""What packed formats share: codes of few bits, and weights that are computed from them by rows.

`PackedRows` are computed by rows of the last dimension, so that a block may begin anywhere. A
matrix that is stored the other way round is read by strips: see stored_matrix.py.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from merge_cli.checkpoint.headers import TensorRef
from merge_cli.checkpoint.tensors import Read, fill_rows
from merge_cli.formats.encoding import Encoding
from merge_cli.kernels.codes import spread

PACKED = ("U8", "I8", "I32", "U32")  # dtypes of packed codes


def unpack(raw: Any, bits: int) -> Any:
    """Codes of bytes in which they lie one after another, the lowest bits first.

    Args:
        raw: numpy uint8 [..., bytes].
        bits: of a code, 1 to 8.

    Returns:
        numpy uint8 [..., 8 * bytes // bits]; of 3, 5, 6 and 7 bits as many more as fill whole
        groups of eight.
    """
    import numpy as np

    if bits == 8:
        return raw
    if 8 % bits == 0:
        return spread(raw, bits)
    mask = (1 << bits) - 1
    groups = -(-raw.shape[-1] // bits)  # eight codes are as many bytes as a code has bits
    padded = np.zeros((*raw.shape[:-1], groups * bits), np.uint8)
    padded[..., : raw.shape[-1]] = raw
    padded = padded.reshape(*raw.shape[:-1], groups, bits)
    word = np.zeros(padded.shape[:-1], np.uint64)
    for position in range(bits):
        word |= padded[..., position].astype(np.uint64) << np.uint64(8 * position)
    codes = np.empty((*word.shape, 8), np.uint8)
    for position in range(8):
        codes[..., position] = (word >> np.uint64(position * bits)) & np.uint64(mask)
    return codes.reshape(*raw.shape[:-1], -1)


@dataclass(frozen=True)
class PackedTensor(ABC):
    """A weight that is computed in float32 from packed codes. See `tensors.Tensor`.

    Attributes:
        name: of the weight, which may be another than that of its codes.
        codes: the packed codes.
        shape: of the weight: [..., rows, columns].
        default_dtype: what it would be stored in without quantisation.
    """

    name: str
    codes: TensorRef
    shape: tuple[int, ...]
    default_dtype: str

    @property
    def model(self) -> str:
        return self.codes.model

    @property
    def dtype(self) -> str:
        return "F32"

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return 4 * self.size

    @property
    @abstractmethod
    def stored(self) -> tuple[TensorRef, ...]:
        """The codes first, then what they are scaled with."""

    @property
    @abstractmethod
    def formula(self) -> str:
        """See `tensors.Tensor`."""

    @property
    def encoding(self) -> Encoding | str:
        """See `encoding.Encoded`."""
        return f"{self.formula} is not written"

    @abstractmethod
    def fill(self, read: Read, start: int, buffer: memoryview) -> None:
        """See `tensors.Tensor`."""


class PackedRows(PackedTensor):
    """One that is computed by rows, so that a block may begin in the middle of one."""

    @abstractmethod
    def rows(self, read: Read, first: int, last: int) -> Any:
        """Rows [first, last) of the matrices one below the other: float32 [rows, columns]."""

    def fill(self, read: Read, start: int, buffer: memoryview) -> None:
        fill_rows(buffer, start, self.shape[-1], partial(self.rows, read))

    def by_matrix(self, first: int, last: int) -> Iterator[tuple[int, int, int]]:
        """Rows [first, last) of a stack by matrices: which one, from and to which of its rows."""
        height, row = self.shape[-2], first
        while row < last:
            matrix, inside = divmod(row, height)
            stop = min(height, inside + last - row)
            yield matrix, inside, stop
            row += stop - inside
