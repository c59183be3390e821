"""The sources' weights, read by rows: from the device, from host memory, or from disk each time.

Whoever merges or projects a tensor asks for a few rows of every source at once and is done with
them soon after. Where they wait in the meantime is chosen by what fits, and told with the reason.

Copying the next tensor's sources to a GPU while the student computes with this one.

Gradients come in the same order in every backward pass, so it is known which tensor is next. Copies
run on a stream of their own, from pinned memory; two tensors at most wait on the device.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from merge_cli.checkpoint.dtypes import torch_dtype, width_of
from merge_cli.checkpoint.headers import TensorRef
from merge_cli.checkpoint.tensors import Tensor
from merge_cli.engine.residency import SourceResidency
from merge_cli.system.raw_io import FilePool, read_ahead, read_into

_HOST_BLOCK, _DEVICE_BLOCK = 1 << 18, 1 << 24  # elements of a block of rows
# Elements of all sources up to which a CPU keeps them as it computes with them: in float32, and as
# changes of the base where those are merged. To make these anew is over a third of what projecting
# costs, and passes through a small model are short. What asks for whole rows, before training,
# reads the files again.
_KEPT_WIDE = 1 << 27


@dataclass(frozen=True)
class Stored:
    """One tensor of every model that is read.

    Attributes:
        shape: rows and columns of the matrix that it is looked at as.
        sources: in the recipe's order.
        base: None where the recipe has no base.
    """

    name: str
    shape: tuple[int, int]
    sources: tuple[Tensor, ...]
    base: Tensor | None = None


class Sources:
    """Rows of every source's tensors.

    Args:
        tensors: by name.
        device, dtype: where and in what rows are handed out.
        with_base: keep the base resident too; otherwise it is read from disk when asked for.
        most_wide: elements of all sources that are kept as they are computed with, at most.
    """

    def __init__(
        self,
        tensors: Mapping[str, Stored],
        residency: SourceResidency,
        device: Any,
        dtype: Any,
        *,
        with_base: bool,
        most_wide: int = _KEPT_WIDE,
    ) -> None:
        self.residency, self._tensors, self._device, self._dtype = residency, tensors, device, dtype
        self._files = FilePool(os.O_RDONLY)
        self._kept: dict[tuple[str, int], Any] = {}
        self.rows_read = 0
        self._with_base = with_base
        self.ahead: Prefetcher | None = None
        self._keeps_deltas = False
        if residency.residency != "disk":
            wide = str(device) == "cpu" and kept_wide(tensors, most_wide, with_base=with_base)
            self._keeps_deltas = wide and with_base
            self._keep(with_base, wide=wide)
        if residency.residency == "host" and str(device) != "cpu":
            self.ahead = Prefetcher(CudaCopies(str(device)))

    def block_rows(self, name: str) -> int:
        """Rows to ask for at once: what fits in a cache, or keeps a GPU busy."""
        block = _block(on_cpu=str(self._device) == "cpu")
        return max(1, block // max(1, self._tensors[name].shape[1]))

    def rows(self, name: str, start: int, stop: int) -> list[Any]:
        """Rows [start, stop) of every source."""
        refs = self._tensors[name].sources
        self.rows_read += stop - start
        return [self._rows(name, i, ref, start, stop) for i, ref in enumerate(refs)]

    def base_rows(self, name: str, start: int, stop: int) -> Any:
        """The same rows of the base."""
        base = self._tensors[name].base
        assert base is not None, "asked for only where there is a base"
        return self._rows(name, -1, base, start, stop)

    def stored_rows(self, name: str, tensor: Tensor, start: int, stop: int) -> Any:
        """The same rows of a tensor that is none of the sources'."""
        rows = self._read(tensor, self._tensors[name].shape, start, stop)
        return rows.to(self._device).to(self._dtype)

    def deltas(self, name: str, start: int, stop: int) -> tuple[Any, list[Any]]:
        """The base's rows, and every source's less the base's."""
        base = self.base_rows(name, start, stop)
        if self._keeps_deltas:
            self.rows_read += stop - start
            sources = range(len(self._tensors[name].sources))
            return base, [self._kept[name, number][start:stop] for number in sources]
        return base, [rows - base for rows in self.rows(name, start, stop)]

    def expect(self, name: str) -> None:
        """This tensor is asked for next: have it brought while something else goes on."""
        if self.residency.residency == "disk":
            stored = self._tensors[name]
            requested = [*stored.sources]
            if self._with_base and stored.base is not None:
                requested.append(stored.base)
            for ref in requested:
                for part in ref.stored:
                    read_ahead(self._files, part.path, part.offset, part.nbytes)
        elif self.ahead is not None:
            numbers = range(-1, len(self._tensors[name].sources))
            kept = [(i, self._kept[name, i]) for i in numbers if (name, i) in self._kept]
            self.ahead.begin(name, kept)

    def close(self) -> None:
        self._files.close()
        self._kept.clear()

    def _keep(self, with_base: bool, *, wide: bool) -> None:
        for name, stored in self._tensors.items():
            numbered: Sequence[tuple[int, Tensor]] = list(enumerate(stored.sources))
            if with_base and stored.base is not None:
                numbered = [*numbered, (-1, stored.base)]
            for number, ref in numbered:
                rows = self._read(ref, stored.shape, 0, stored.shape[0])
                if wide:
                    rows = rows.to(self._dtype)
                if self.residency.residency == "device":
                    rows = rows.to(self._device)
                elif str(self._device) != "cpu":
                    rows = rows.pin_memory()
                self._kept[name, number] = rows
            if self._keeps_deltas and stored.base is not None:
                for number in range(len(stored.sources)):
                    self._kept[name, number] -= self._kept[name, -1]

    def _rows(self, name: str, number: int, ref: Tensor, start: int, stop: int) -> Any:
        as_deltas = self._keeps_deltas and number >= 0
        kept = None if as_deltas else self._kept.get((name, number))
        if self.ahead is not None and kept is not None:
            brought = self.ahead.take(name, number)
            kept = kept if brought is None else brought
        rows = (
            self._read(ref, self._tensors[name].shape, start, stop)
            if kept is None
            else kept[start:stop]
        )
        return rows.to(self._device, non_blocking=True).to(self._dtype)

    def _read(self, tensor: Tensor, shape: tuple[int, int], start: int, stop: int) -> Any:
        """Rows as they are stored."""
        import torch

        line = shape[1] * width_of(tensor.dtype)
        raw = torch.empty((stop - start) * line, dtype=torch.uint8)
        if raw.numel():
            tensor.fill(self._stored, start * shape[1], raw.numpy().data)
        return raw.view(torch_dtype(tensor.dtype)).view(stop - start, shape[1])

    def _stored(self, ref: TensorRef, start: int, buffer: memoryview) -> None:
        offset = ref.offset + start * width_of(ref.dtype)
        read_into(self._files, ref.path, offset, buffer, ref.model)


def kept_wide(tensors: Mapping[str, Stored], most: int = _KEPT_WIDE, *, with_base: bool) -> bool:
    """Whether a CPU keeps the sources in float32, whatever they are stored as."""
    elements = sum(
        math.prod(stored.shape) * (len(stored.sources) + with_base) for stored in tensors.values()
    )
    return elements <= most


def block_bytes(sources: int, largest: int, *, on_cpu: bool) -> int:
    """What projecting a block of rows takes: each source, base, gradient, product, in float32.

    Args:
        largest: elements of the largest tensor.
    """
    return 4 * min(_block(on_cpu=on_cpu), largest) * (sources + 3)


def _block(*, on_cpu: bool) -> int:
    return _HOST_BLOCK if on_cpu else _DEVICE_BLOCK


class Copies(Protocol):
    """What brings host tensors to a device without waiting for them."""

    def start(self, rows: Any) -> Any:
        """Begin to copy; something to `finish`."""

    def finish(self, started: Any) -> Any:
        """The copy, safe to compute with on the current stream."""


class CudaCopies:
    """`Copies` on a CUDA stream of its own."""

    def __init__(self, device: str) -> None:
        import torch

        self._device = torch.device(device)
        # torch's own stubs leave Stream and Event untyped.
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]  # torch's

    def start(self, rows: Any) -> Any:
        import torch

        with torch.cuda.stream(self._stream):
            copy = rows.to(self._device, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch's
            event.record(self._stream)
        return copy, event

    def finish(self, started: Any) -> Any:
        import torch

        copy, event = started
        current = torch.cuda.current_stream(self._device)
        current.wait_event(event)
        copy.record_stream(current)  # or its memory could be given away while it is used
        return copy


class Prefetcher:
    """The tensors that are on their way, by name; the one before the last is forgotten."""

    def __init__(self, copies: Copies) -> None:
        self._copies = copies
        self._started: dict[str, dict[int, Any]] = {}

    def begin(self, name: str, rows: Sequence[tuple[int, Any]]) -> None:
        """Bring the numbered rows of a tensor, unless they are under way."""
        if name in self._started:
            return
        self._started[name] = {number: self._copies.start(item) for number, item in rows}
        while len(self._started) > 2:
            self._started.pop(next(iter(self._started)))

    def take(self, name: str, number: int) -> Any:
        """A whole tensor that was brought; None where nobody asked for it."""
        started = self._started.get(name, {}).get(number)
        return None if started is None else self._copies.finish(started)
