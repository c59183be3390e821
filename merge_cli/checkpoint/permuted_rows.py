"""Tensors whose rows are those of others in another order, or means of them.

Embeddings and heads after a change of vocabulary, and heads of attention that a format stores in
another order. Numbers are computed only where sources have several dtypes or a row is a mean.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from merge_cli.checkpoint.dtypes import numpy_dtype, width_of
from merge_cli.checkpoint.headers import TensorRef
from merge_cli.checkpoint.tensors import Read, Tensor, read_pieces

ZERO = -1  # instead of a part's number: a row of zeros
_MEAN = -2  # or: the mean of the rows of all tokens
_TOGETHER = 4096  # rows that a mean adds up at once
_GAP = 8  # rows that are read along rather than read around


@dataclass(frozen=True, eq=False)
class SourceRows:
    """Where each row comes from; shared by all tensors of a model that have a row for each token.

    Attributes:
        part: int32 [rows], which model's, or `ZERO`.
        row: int64 [rows], which row there.
        means: row -> the (part, row) pairs that it is the mean of; `part` has the first one.
        averaged: the rows that padding is the mean of; None where there is none.
    """

    part: Any
    row: Any
    means: Mapping[int, Sequence[tuple[int, int]]]
    averaged: Any = None

    @cached_property
    def digest(self) -> str:
        state = hashlib.sha256(self.part.tobytes() + self.row.tobytes())
        state.update(repr(sorted(self.means.items())).encode())
        if self.averaged is not None:
            state.update(self.averaged.tobytes())
        return state.hexdigest()

    @property
    def computes(self) -> bool:
        """Whether any row is more than another one's bytes."""
        return bool(self.means) or self.averaged is not None


def padded(rows: SourceRows, count: int, tokens: Iterable[int]) -> SourceRows:
    """As many rows, those that are added the mean of the rows of all tokens, as in mergekit."""
    import numpy as np

    more = count - len(rows.row)
    if not more:
        return rows
    part = np.concatenate([rows.part, np.full(more, _MEAN, rows.part.dtype)])
    row = np.concatenate([rows.row, np.zeros(more, rows.row.dtype)])
    return SourceRows(part, row, rows.means, np.array(sorted(set(tokens)), np.int64))


@dataclass(frozen=True, eq=False)
class PermutedRows:
    """See `tensors.Tensor`.

    Attributes:
        tensor: the model's tensor as it is stored, or computed.
        parts: every model's tensor of this name, in the order that `rows.part` counts in.
    """

    tensor: Tensor
    parts: tuple[Tensor, ...]
    rows: SourceRows

    @property
    def name(self) -> str:
        return self.tensor.name

    @property
    def model(self) -> str:
        return self.tensor.model

    @property
    def default_dtype(self) -> str:
        return self.tensor.default_dtype

    @cached_property
    def dtype(self) -> str:
        formats = {part.dtype for part in self.parts}
        if len(formats) == 1 and not self.rows.computes:
            return self.tensor.dtype
        return "F64" if "F64" in formats else "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.rows.row), *self.tensor.shape[1:])

    @cached_property
    def size(self) -> int:
        return self._width * len(self.rows.row)

    @property
    def nbytes(self) -> int:
        return self.size * width_of(self.dtype)

    @property
    def stored(self) -> tuple[TensorRef, ...]:
        others = (ref for part in self.parts for ref in part.stored)
        return tuple(dict.fromkeys((*self.tensor.stored, *others)))

    @property
    def formula(self) -> str:
        parts = [part.formula for part in self.parts]
        return f"rows {self.rows.digest} of {len(parts)} models {parts if any(parts) else ''}"

    @cached_property
    def _width(self) -> int:
        """Elements of a row."""
        return self.tensor.size // self.tensor.shape[0] if self.tensor.shape[0] else 0

    def fill(self, read: Read, start: int, buffer: memoryview) -> None:
        """Whole rows are brought together, of which the buffer gets its part."""
        import numpy as np

        item, width = width_of(self.dtype), self._width
        count = len(buffer) // item
        first, last = start // width, -(-(start + count) // width)
        begin, kind = start - first * width, numpy_dtype(self.dtype)
        target = np.frombuffer(buffer, kind)
        is_whole = count == (last - first) * width
        out = (target if is_whole else np.empty((last - first) * width, kind)).reshape(-1, width)
        self._gather(read, first, last, out)
        if not is_whole:
            target[:] = out.reshape(-1)[begin : begin + count]

    def _gather(self, read: Read, first: int, last: int, out: Any) -> None:
        """Rows [first, last): numpy [rows, width], filled."""
        import numpy as np

        part, row = self.rows.part[first:last], self.rows.row[first:last]
        numbers = np.unique(part).tolist()
        if len(numbers) == 1 and numbers[0] >= 0 and not self.rows.computes:
            self._fill_rows(read, self.parts[numbers[0]], row, out)
            return
        out[part == ZERO] = 0
        for number in numbers:
            if number >= 0:
                chosen = np.flatnonzero(part == number)
                rows = np.empty((len(chosen), self._width), out.dtype)
                self._fill_rows(read, self.parts[number], row[chosen], rows)
                out[chosen] = rows
        for position in [p for p in self.rows.means if first <= p < last]:
            pairs = self.rows.means[position]
            total, each = np.zeros(self._width, out.dtype), np.empty((1, self._width), out.dtype)
            for number, source_row in pairs:
                self._fill_rows(read, self.parts[number], np.array([source_row]), each)
                total += each[0]
            out[position - first] = total / out.dtype.type(len(pairs))
        padding = np.flatnonzero(part == _MEAN)
        if len(padding):
            out[padding] = self._mean(read)

    def _mean(self, read: Read) -> Any:
        """The mean of the rows of all tokens, added up in their order."""
        import numpy as np

        averaged = self.rows.averaged
        total = np.zeros(self._width, np.float64)
        for start in range(0, len(averaged), _TOGETHER):
            chosen = averaged[start : start + _TOGETHER]
            for low, high in _runs(chosen):
                block = np.empty(((high - low), self._width), numpy_dtype(self.dtype))
                self.fill(read, low * self._width, block.view(np.uint8).reshape(-1).data)
                for row in block:
                    total += row
        return total / len(averaged)

    def _fill_rows(self, read: Read, tensor: Tensor, rows: Any, out: Any) -> None:
        """Rows of one model's tensor as this tensor's dtype; near ones are read together."""
        import numpy as np

        width, kind = self._width, numpy_dtype(tensor.dtype)
        order = np.argsort(rows, kind="stable")
        ordered = rows[order]
        cuts = np.flatnonzero(np.diff(ordered) > _GAP) + 1
        same = tensor.dtype == self.dtype
        result = out if same else np.empty((len(rows), width), kind)
        starts, ends = [0, *cuts.tolist()], [*cuts.tolist(), len(rows)]
        if isinstance(tensor, TensorRef) and len(starts) > len(rows) // 2:  # most by themselves
            read_pieces(read, tensor, np.asarray(rows, np.int64) * width, result)
            starts, ends = [], []
        for start, end in zip(starts, ends, strict=True):
            low, count = int(ordered[start]), int(ordered[end - 1] + 1 - ordered[start])
            near = np.empty((count, width), kind)
            tensor.fill(read, low * width, near.view(np.uint8).reshape(-1).data)
            result[order[start:end]] = near[ordered[start:end] - low]
        if not same:
            out[:] = _floats(result, tensor.dtype)


def _runs(ordered: Any) -> Iterator[tuple[int, int]]:
    """Half-open ranges that ascending numbers fill."""
    import numpy as np

    cuts = np.flatnonzero(np.diff(ordered) > 1) + 1
    for part in np.split(ordered, cuts):
        yield int(part[0]), int(part[-1]) + 1


def _floats(values: Any, dtype: str) -> Any:
    import numpy as np

    if dtype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values if dtype == "F64" else values.astype(np.float32)
