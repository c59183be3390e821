"""fp8 weights with their scales, dequantised to float32 while they are read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from merge_cli.checkpoint.headers import TensorRef
from merge_cli.checkpoint.tensors import Float32, Read, Tensor, read_numbers


@dataclass(frozen=True)
class DequantizedTensor(Float32):
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
    def made_of(self) -> Tensor:
        return self.weight

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
        if self.scale.size == 1:
            out *= _numbers(read, self.scale, 0, 1)[0]
            return
        columns = self.shape[-1]
        stop = start + len(out)
        first, last = start // columns, -(-stop // columns)
        for low, high, scale in self._slabs(read, first, last):
            begin, end = max(start, low * columns), min(stop, high * columns)
            slab = out[begin - start : end - start]
            if not np.ndim(scale):
                slab *= scale
                continue
            # The ends may be parts of rows; what lies between are whole ones.
            head = -begin % columns
            if head:
                slab[:head] *= scale[columns - head :][: len(slab)]
            rows_length = (len(slab) - head) // columns * columns if len(slab) > head else 0
            if rows_length:
                slab[head : head + rows_length].reshape(-1, columns)[:] *= scale
            tail = len(slab) - head - rows_length
            if tail > 0:
                slab[head + rows_length :] *= scale[:tail]

    def _slabs(self, read: Read, first: int, last: int) -> Iterator[tuple[int, int, Any]]:
        """Runs of rows with the same scales: from, to, and a number or one for each column."""
        import numpy as np

        assert self.scale is not None
        tall, wide = self.block
        height = self.shape[-2] if len(self.shape) > 1 else 1
        per_matrix = -(-height // tall)
        across = self.scale.size * height // (per_matrix * (self.size // self.shape[-1]))
        row = first
        while row < last:
            matrix, inside = divmod(row, height)
            end = min(last, matrix * height + min(height, (inside // tall + 1) * tall))
            scale_row = matrix * per_matrix + inside // tall
            numbers = _numbers(read, self.scale, scale_row * across, across)
            if across == 1:
                yield row, end, numbers[0]
            else:
                yield row, end, np.repeat(numbers, wide)[: self.shape[-1]]
            row = end


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
    result = np.empty(256, np.float32)
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
        result[code] = sign * value
    return result
