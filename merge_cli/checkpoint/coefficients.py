"""coefficients.safetensors: what every weight of every source is multiplied by.

For each tensor of the output a float32 entry [sources, ...] whose rest broadcasts against the
tensor: [1, columns] is one coefficient for each input column, [rows, 1] for each row, [1, 1] one
for the tensor. Two more entries, NAME:rows [sources, rows, rank] and NAME:columns [sources,
columns, rank], add their product to it. The header's metadata says what the sum starts from.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

from merge_cli.checkpoint.headers import TensorRef, parse_header, read_header_file
from merge_cli.errors import CorruptFileError, NonFiniteError

FILE = "coefficients.safetensors"
ROWS, COLUMNS = ":rows", ":columns"
FORMAT = "merge-cli coefficients 1"
Form = Literal["soup", "task_vector"]


@dataclass(frozen=True)
class TensorCoefficients:
    """The coefficients of one tensor.

    Attributes:
        shape: of the tensor.
        values: float32 array [sources, ...] that broadcasts against the tensor.
        rows, columns: factors of a correction; None without one.
    """

    shape: tuple[int, ...]
    values: Any
    rows: Any = None
    columns: Any = None

    @cached_property
    def _table(self) -> tuple[Any, Any]:
        """values as [sources, rows of coefficients, 1 or columns], and each tensor row's row."""
        import numpy as np

        lead = self.shape[:-1]
        rest = (1,) * (len(self.shape) - (self.values.ndim - 1)) + self.values.shape[1:]
        count = math.prod(rest[:-1])
        numbers = np.arange(count).reshape(rest[:-1])
        row_of = np.broadcast_to(numbers, lead).reshape(-1)
        return self.values.reshape(len(self.values), count, rest[-1] if rest else 1), row_of

    def span(self, source: int, start: int, size: int, like: Any) -> Any:
        """The coefficient of each of `size` elements from the flat index `start` on.

        One number where it is the same for all. Each element's value is computed by itself and in
        a fixed order, so that it does not depend on how a tensor is cut.

        Args:
            like: a flat numpy array or tensor; the result is of its kind, on its device.
        """
        import numpy as np

        table, row_of = self._table
        if table[source].size == 1 and self.rows is None:
            return float(table[source, 0, 0])
        width = self.shape[-1]
        first, last = start // width, -(-(start + size) // width)
        result = np.asarray(table[source][row_of[first:last]], np.float32)
        if result.shape[1] != width:
            result = np.broadcast_to(result, (last - first, width))
        if self.rows is not None:
            result = result.astype(np.float32, copy=True)
            for left, right in zip(
                np.asarray(self.rows[source, first:last]).T,
                np.asarray(self.columns[source]).T,
                strict=True,
            ):
                result += left[:, None] * right[None, :]
        flat = result.reshape(-1)[start - first * width :][:size]
        if isinstance(like, np.ndarray):
            return flat
        import torch

        return torch.from_numpy(np.ascontiguousarray(flat)).to(like.device)

    def mean(self, source: int) -> float:
        """The mean over all elements of the tensor."""
        import numpy as np

        table, row_of = self._table
        per_row = np.asarray(table[source], np.float64).mean(1)
        mean = float(np.bincount(row_of, minlength=len(per_row)) @ per_row / max(len(row_of), 1))
        if self.rows is not None:
            rows = np.asarray(self.rows[source], np.float64).mean(0)
            mean += float(rows @ np.asarray(self.columns[source], np.float64).mean(0))
        return mean


@dataclass(frozen=True)
class CoefficientFile:
    """An opened file of coefficients; the entries are mapped into memory, not read.

    Attributes:
        digest: SHA-256 of the whole file: other coefficients, other bytes of the merge.
        sources: how many sources it has coefficients for.
    """

    path: Path
    form: Form
    digest: str
    sources: int
    refs: Mapping[str, TensorRef] = field(repr=False)

    def __contains__(self, name: str) -> bool:
        return name in self.refs

    def of(self, name: str, shape: Sequence[int]) -> TensorCoefficients:
        """The coefficients of a tensor of this shape."""
        entries = [self._map(key) for key in (name, name + ROWS, name + COLUMNS)]
        return TensorCoefficients(tuple(shape), *entries)

    def problems(self, name: str, shape: Sequence[int], sources: int) -> Iterator[str]:
        """Why a tensor of this shape cannot be merged with this file."""
        if name not in self.refs:
            yield f"{self.path.name} has no coefficients for it"
            return
        count, *rest = self.refs[name].shape or (0,)
        if count != sources:
            yield f"{self.path.name} has coefficients for {count} sources, not {sources}"
        whole_shape = tuple(shape) or (1,)  # a scalar is learned as a tensor of one element
        padded = [1] * (len(whole_shape) - len(rest)) + rest
        fits = len(padded) == len(whole_shape) and all(
            c in (1, n) for c, n in zip(padded, whole_shape, strict=True)
        )
        if not fits:
            yield f"coefficients of shape {rest} do not fit the shape {list(shape)}"
        factors = [self.refs.get(name + end) for end in (ROWS, COLUMNS)]
        if any(factors):
            rows, columns = (ref.shape if ref else () for ref in factors)
            whole = math.prod(shape[:-1]), (shape[-1] if shape else 1)
            if rows[:2] != (count, whole[0]) or columns != (count, whole[1], *rows[2:]):
                yield f"a correction of shapes {list(rows)} and {list(columns)} does not fit"

    def is_finite(self, name: str) -> bool:
        """Whether no number of an entry is NaN or Inf; read in blocks."""
        import numpy as np

        flat = self._map(name).reshape(-1)
        block = 1 << 20
        return all(np.isfinite(flat[i : i + block]).all() for i in range(0, len(flat), block))

    def _map(self, name: str) -> Any:
        import numpy as np

        ref = self.refs.get(name)
        if ref is None:
            return None
        if not ref.size:
            return np.zeros(ref.shape, np.float32)
        return np.memmap(self.path, np.float32, "r", ref.offset, ref.shape)


def open_coefficients(path: Path) -> CoefficientFile:
    """Read the header of a file of coefficients.

    Raises:
        CorruptFileError: not such a file.
        NonFiniteError: NaN or Inf among the coefficients.
    """
    raw = read_header_file(path, "")
    refs = parse_header(raw, path, path.stat().st_size, "")
    length = struct.unpack("<Q", raw[:8])[0]
    metadata = json.loads(raw[8 : 8 + length]).get("__metadata__") or {}
    form = metadata.get("form")
    if metadata.get("format") != FORMAT or form not in ("soup", "task_vector"):
        hint = "Name the coefficients.safetensors that training left beside a model."
        raise CorruptFileError("is not a file of coefficients", file=str(path), hint=hint)
    wrong = next((ref for ref in refs.values() if ref.dtype != "F32" or not ref.shape), None)
    if wrong is not None:
        message = f"coefficients are float32 with one row for each source, not {wrong.dtype}"
        raise CorruptFileError(message, file=str(path), tensor=wrong.name)
    counts = {ref.shape[0] for ref in refs.values()}
    if len(counts) != 1:
        message = f"its entries are for different numbers of sources ({sorted(counts)})"
        raise CorruptFileError(message, file=str(path))
    with path.open("rb") as file:
        state = hashlib.sha256()
        while block := file.read(1 << 22):
            state.update(block)
    coefficients = CoefficientFile(path, cast(Form, form), state.hexdigest(), counts.pop(), refs)
    for name in refs:
        if not coefficients.is_finite(name):
            raise NonFiniteError("a coefficient is NaN or Inf", file=str(path), tensor=name)
    return coefficients
