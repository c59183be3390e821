"""An fp8 weight with its scales, as numbers: dequantised while it is read."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from merge_cli.checkpoint.header import TensorRef
from merge_cli.checkpoint.stored import read_numbers
from merge_cli.checkpoint.tensors import Read


@dataclass(frozen=True)
class Dequantised:
    """`weight` times `scale`, in float32. See `tensors.Tensor`.

    Attributes:
        scale: one number, one for each row, or one for each block of rows and columns; of stacked
            matrices for each of them. None where there is none.
        block: rows and columns of a block.
        native: what the model's weights would be without quantisation.
    """

    weight: TensorRef
    scale: TensorRef | None
    block: tuple[int, int]
    native: str = "BF16"

    @property
    def name(self) -> str:
        return self.weight.name

    @property
    def model(self) -> str:
        return self.weight.model

    @property
    def dtype(self) -> str:
        return "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @property
    def size(self) -> int:
        return self.weight.size

    @property
    def nbytes(self) -> int:
        return 4 * self.size

    @property
    def stored(self) -> tuple[TensorRef, ...]:
        return (self.weight, self.scale) if self.scale else (self.weight,)

    @property
    def formula(self) -> str:
        return f"{self.weight.dtype} times its scales by blocks of {self.block}"

    def fill(self, read: Read, start: int, buffer: memoryview) -> None:
        import numpy as np

        out = np.frombuffer(buffer, np.float32)
        raw = np.empty(len(out), np.uint8)
        read(self.weight, start, raw.data)
        np.take(_table(self.weight.dtype), raw, out=out)
        if self.scale is None:
            return
        columns = self.shape[-1] if self.shape else 1
        first, last = start // columns, -(-(start + len(out)) // columns)
        scales = self._scales(read, first, last)
        begin = start
        for row in range(first, last):  # a multiplication for each row: rows are long
            end = min((row + 1) * columns, start + len(out))
            own = scales[row - first]
            at = begin - row * columns
            part = out[begin - start : end - start]
            part *= own if own.ndim == 0 else own[at : at + len(part)]
            begin = end

    def _scales(self, read: Read, first: int, last: int) -> Any:
        """For each row a number, or one for each of its columns."""
        import numpy as np

        assert self.scale is not None
        scale, (tall, wide) = self.scale, self.block
        rows = np.arange(first, last)
        if scale.size == 1:
            return np.full(last - first, _numbers(read, scale, 0, 1)[0])
        height = self.shape[-2] if len(self.shape) > 1 else 1
        per_matrix = -(-height // tall)
        places = rows // height * per_matrix + rows % height // tall
        low, high = int(places[0]), int(places[-1]) + 1
        across = scale.size // (per_matrix * max(1, self.size // (height * self.shape[-1])))
        table = _numbers(read, scale, low * across, (high - low) * across).reshape(-1, across)
        if across == 1:
            return table[places - low, 0]
        spread = np.repeat(table, wide, axis=1)[:, : self.shape[-1]]
        return spread[places - low]


def _numbers(read: Read, ref: TensorRef, start: int, count: int) -> Any:
    """Scales as float32; E8M0 has exponents alone."""
    import numpy as np

    if ref.dtype != "F8_E8M0":
        return read_numbers(read, ref, start, count)
    raw = np.empty(count, np.uint8)
    read(ref, start, raw.data)
    return np.exp2(raw.astype(np.float32) - 127)


@cache
def _table(dtype: str) -> Any:
    """The 256 numbers of a format."""
    import numpy as np

    fraction, bias = (3, 7) if dtype == "F8_E4M3" else (2, 15)
    found = np.empty(256, np.float32)
    for code in range(256):
        sign = -1.0 if code & 0x80 else 1.0
        exponent, mantissa = (code & 0x7F) >> fraction, code & ((1 << fraction) - 1)
        if exponent:
            value = (1 + mantissa / (1 << fraction)) * 2.0 ** (exponent - bias)
        else:
            value = mantissa / (1 << fraction) * 2.0 ** (1 - bias)
        if dtype == "F8_E4M3" and code & 0x7F == 0x7F:
            value = float("nan")
        if dtype == "F8_E5M2" and exponent == 31:
            value = float("nan") if mantissa else float("inf")
        found[code] = sign * value
    return found
