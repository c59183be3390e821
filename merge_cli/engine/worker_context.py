"""What one thread works with: buffers that it reuses, and a clock.

A worker brings spans of files to where they are computed with, and results back into files. On a
CPU that is a read into a buffer and a write from one. On a GPU (device_worker.py) the buffers are
pinned and copies run on the worker's own stream, so that while one worker waits for the disk
another one copies and a third computes. Buffers are few and small: they, and not a queue of
tensors, are all the memory that a merge needs.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, cast

from merge_cli.checkpoint.dtypes import width_of
from merge_cli.checkpoint.headers import TensorRef
from merge_cli.checkpoint.tensors import Tensor
from merge_cli.engine.files import Files, StageClock
from merge_cli.kernels.convert import decode, decode_row, decode_rows, encode, encode_into
from merge_cli.kernels.fused import FORMATS, StoredBlock, stored_starts
from merge_cli.kernels.relation_streams import Runs, read_sample
from merge_cli.kernels.streams import Stored, StoredSpan, Streams

_WIDEST = 8  # bytes of an element in the widest format
_ALIGNMENT = 64 * 1024  # more than what aligning every input takes


@dataclass(frozen=True)
class LoadedBlock:
    """One span of every input, upcast.

    Attributes:
        base: None without one.
        operands: the sources; less the base, if they are task vectors.
        finite: whether every stored value is a finite number.
    """

    base: Any
    operands: list[Any]
    finite: bool


class WorkerContext(Protocol):
    """`HostWorker`, `TorchWorker` or `device_worker.StagedWorker`.

    Attributes:
        block: elements in a block.
        fuses: it is a `HostWorker` that computes with compiled loops.
    """

    clock: StageClock
    block: int
    fuses: bool

    def active(self) -> AbstractContextManager[Any]:
        """Entered by the worker's thread around everything that it computes."""

    def load(
        self, refs: Sequence[Tensor], start: int, stop: int, *, base: bool, deltas: bool
    ) -> LoadedBlock:
        """Elements [start, stop) of each tensor, flat.

        Args:
            base: the first tensor is the base.
            deltas: subtract it from the others.
        """

    def store(self, values: Any, dtype: str, path: Path, offset: int) -> bool:
        """Round values to the dtype, write them; whether they are finite where the dtype is F16."""

    def fetch(self, values: Any) -> Any:
        """Values as numpy float32 on the host, to be looked at before the worker's next call."""

    def read(self, tensor: Tensor, start: int, buffer: memoryview) -> None:
        """Fill a buffer of the host with a tensor's elements from `start` on."""

    def write(self, data: memoryview, path: Path, offset: int) -> None:
        """Bytes of the host into a file."""

    def close(self) -> None:
        """Give the buffers back."""


class HostWorker:
    """Computes with numpy arrays and compiled loops. Blocks stay in the cache."""

    fuses = True

    def __init__(self, files: Files, block: int, inputs: int) -> None:
        self.clock, self.block, self._files = StageClock(), block, files
        # Anonymous pages of our own: aligned, and in memory only where they have been used.
        self._buffer = mmap.mmap(-1, block * _WIDEST * inputs + _ALIGNMENT)
        # Whose bytes lie in the buffer, where a loop has left a whole span in it.
        self._holds: tuple[Sequence[Stored], int, int] | None = None

    def active(self) -> AbstractContextManager[Any]:
        import numpy as np

        # Inf and NaN are reported by name; allowed ones need no warning for each block.
        return np.errstate(all="ignore")

    def load(
        self, refs: Sequence[Tensor], start: int, stop: int, *, base: bool, deltas: bool
    ) -> LoadedBlock:
        import numpy as np

        size = stop - start
        # One matrix, so that compiled loops over sources take it as it is.
        rows = np.empty((len(refs) - base, size), np.float32)
        base_values = np.empty(size, np.float32) if base else None
        formats = {ref.dtype for ref in refs}
        if len(formats) == 1 and "F32" not in formats:
            (dtype,) = formats
            raw = self._raw(len(refs), size, dtype)
            for stored, ref in zip(raw, refs, strict=True):
                self._files.read(self.clock, ref, start, stored.data)
            return LoadedBlock(
                base_values, list(rows), decode_rows(raw, dtype, rows, base_values, deltas=deltas)
            )
        finite = True
        targets = [base_values, *rows] if base else list(rows)
        for ref, target in zip(refs, targets, strict=True):
            # float32 comes as it is computed with: right to where it belongs.
            is_wide = ref.dtype == "F32"
            stored = target.view(np.uint8) if is_wide else self._raw(1, size, ref.dtype)[0]
            self._files.read(self.clock, ref, start, stored.data)
            finite &= decode_row(stored, ref.dtype, target)
        if base_values is not None and deltas:
            np.subtract(rows, base_values, out=rows)
        return LoadedBlock(base_values, list(rows), finite)

    def load_stored(
        self, refs: Sequence[Tensor], start: int, stop: int, *, base: bool, dtype: str
    ) -> tuple[StoredBlock, Any]:
        """Elements [start, stop) of each tensor as stored, until the worker's next call.

        Args:
            base: the first tensor is the base.

        Returns:
            them, and room for as many elements of `dtype` (numpy uint8).
        """

        size = stop - start
        sizes = [size] * len(refs)
        starts, kinds = stored_starts(sizes, [ref.dtype for ref in refs])
        buffer, self._holds = self._bytes, None
        for ref, first in zip(refs, starts, strict=False):
            raw = buffer[first : first + size * width_of(ref.dtype)]
            self._files.read(self.clock, ref, start, raw.data)
        out = buffer[starts[-1] : starts[-1] + size * width_of(dtype)]
        return StoredBlock(buffer, starts[:-1], kinds, start, size, base), out

    def stored_inputs(self, tensors: Sequence[Tensor]) -> list[Stored] | None:
        """Where tensors lie, for loops that read them; None where one is computed, or vanished."""
        if not self._files.on_disk or any(type(tensor) is not TensorRef for tensor in tensors):
            return None
        try:
            return [
                (self._files.sources.fd(ref.path), ref.offset, FORMATS[ref.dtype])
                for ref in cast(Sequence[TensorRef], tensors)
            ]
        except OSError:
            return None  # it is read in the plain way, which says what is wrong

    def stored_target(self, path: Path, offset: int, dtype: str) -> Stored | None:
        """Where a result goes, for loops that write it; None where it cannot be opened."""
        try:
            return self._files.shards.fd(path), offset, FORMATS[dtype]
        except OSError:
            return None  # likewise

    def run_streams(self, streams: Streams, first: int) -> int:
        """`Streams.run` in this worker's buffer, on its clock."""
        import numpy as np

        spent, self._holds = np.zeros(4), None
        number = streams.run(first, self._bytes, self.block, spent)
        self.clock.add(spent)
        return number

    def read_sample(self, tensors: Sequence[Tensor], runs: Runs, columns: Sequence[int]) -> Any:
        """`kernels.streams.read_sample`, of tensors as they are stored; None of others."""
        import numpy as np

        stored = all(tensor.dtype in FORMATS for tensor in tensors)
        inputs, spent = self.stored_inputs(tensors) if stored else None, np.zeros(4)
        if inputs is None:
            return None
        self._holds = None
        changes = read_sample(inputs, runs, columns, self._bytes, spent)
        self.clock.add(spent)
        return changes

    def span(
        self,
        tensors: Sequence[Tensor],
        start: int,
        stop: int,
        *,
        base: bool,
    ) -> StoredSpan:
        """Elements [start, stop) of each tensor as stored, block by block."""

        def load(begin: int, end: int) -> StoredBlock:
            return self.load_stored(tensors, begin, end, base=base, dtype=tensors[0].dtype)[0]

        inputs = self.stored_inputs(tensors)

        def on_spent(spent: Any, is_whole: bool) -> None:
            self.clock.add(spent)
            self._holds = (inputs, start, stop) if inputs is not None and is_whole else None

        return StoredSpan(start, stop, base, inputs, self._bytes, self.block, load, on_spent)

    def holds(self, inputs: Sequence[Stored], start: int, stop: int) -> bool:
        """Whether the last loop has left elements [start, stop) in the buffer."""
        return self._holds == (inputs, start, stop)

    @cached_property
    def _bytes(self) -> Any:
        import numpy as np

        return np.frombuffer(self._buffer, np.uint8)

    def _raw(self, inputs: int, size: int, dtype: str) -> Any:
        """(inputs, bytes) of the worker's buffer."""
        import numpy as np

        self._holds = None
        width = size * width_of(dtype)
        return np.frombuffer(self._buffer, np.uint8, inputs * width).reshape(inputs, width)

    def store(self, values: Any, dtype: str, path: Path, offset: int) -> bool:
        raw = self._raw(1, len(values), dtype)[0]
        fits = encode_into(values, dtype, raw)
        self._files.write(self.clock, path, offset, raw.data)
        return fits

    def fetch(self, values: Any) -> Any:
        return values

    def read(self, tensor: Tensor, start: int, buffer: memoryview) -> None:
        self._files.read(self.clock, tensor, start, buffer)

    def write(self, data: memoryview, path: Path, offset: int) -> None:
        self._files.write(self.clock, path, offset, data)

    def close(self) -> None:
        """The buffer goes when the last array that looks into it does."""


class TorchWorker(HostWorker):
    """Computes with torch on a CPU: for float64, for methods that want tensors, without numba."""

    fuses = False

    def load(
        self, refs: Sequence[Tensor], start: int, stop: int, *, base: bool, deltas: bool
    ) -> LoadedBlock:
        import torch

        wide = any(ref.dtype == "F64" for ref in refs)
        arrays = []
        for ref in refs:
            raw = self._raw(1, stop - start, ref.dtype)[0]
            self._files.read(self.clock, ref, start, raw.data)
            arrays.append(decode(torch.from_numpy(raw), ref.dtype, wide=wide))
        finite = all_finite(arrays)
        base_values = arrays.pop(0) if base else None
        return LoadedBlock(
            base_values, [a.sub_(base_values) for a in arrays] if deltas else arrays, finite
        )

    def store(self, values: Any, dtype: str, path: Path, offset: int) -> bool:
        import torch

        rounded, fits = encode(values, dtype)
        self._files.write(self.clock, path, offset, rounded.view(torch.uint8).numpy().data)
        return fits

    def fetch(self, values: Any) -> Any:
        return values.float().numpy()


def all_finite(tensors: Sequence[Any]) -> bool:
    """Whether no tensor holds NaN or Inf; one wait for a device, whatever their number."""
    import torch

    # A sum of squares is finite only if every element is, and costs one quick pass; it can also
    # overflow, so that only the count decides.
    if bool(torch.stack([tensor.dot(tensor) for tensor in tensors]).isfinite().all()):
        return True
    return all(bool(tensor.isfinite().all()) for tensor in tensors)
