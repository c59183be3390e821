"""A worker that computes on a GPU: pinned buffers, and copies on a stream of its own.

Within a worker things happen one after another: read from the files into a pinned buffer, copy up,
compute, copy down, write. Several workers share a device, so that all of these go on at once; the
buffers of all workers together bound the bytes in flight. A buffer must not be touched again before
the copy that uses it has ended: `Transfers` keeps that order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

from merge_cli.checkpoint.dtypes import width_of
from merge_cli.checkpoint.tensors import Tensor
from merge_cli.engine.files import Files, StageClock
from merge_cli.engine.worker_context import LoadedBlock, all_finite
from merge_cli.kernels.convert import decode, encode


class Transfers(Protocol):
    """Copies between the host and one device, in order, without waiting for them."""

    def active(self) -> AbstractContextManager[Any]:
        """What the thread computes inside happens on this device, in order with the copies."""

    def host(self, size: int) -> Any:
        """A host buffer of `size` bytes (torch uint8) that copies may use."""

    def up(self, host: Any) -> Any:
        """A copy on the device of a part of a host buffer; the part must stay as it is."""

    def down(self, device: Any, host: Any) -> None:
        """Copy into a part of a host buffer; it is filled after `wait`."""

    def wait_up(self) -> None:
        """Until what went up is there, and its host buffers are free."""

    def wait(self) -> None:
        """Until everything is done."""


class CudaTransfers:
    """`Transfers` on a CUDA stream."""

    def __init__(self, index: int) -> None:
        import torch

        self._device = torch.device("cuda", index)
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]  # torch's
        self._gone_up = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch's

    @contextmanager
    def active(self) -> Iterator[None]:
        import torch

        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            yield

    def host(self, size: int) -> Any:
        import torch

        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def up(self, host: Any) -> Any:
        copy = host.to(self._device, non_blocking=True)
        self._gone_up.record(self._stream)
        return copy

    def down(self, device: Any, host: Any) -> None:
        host.copy_(device, non_blocking=True)

    def wait_up(self) -> None:
        self._gone_up.synchronize()

    def wait(self) -> None:
        self._stream.synchronize()


class StagedWorker:
    """Computes with torch on a device. Buffers grow to what the widest block needs."""

    fuses = False

    def __init__(self, files: Files, transfers: Transfers, block: int) -> None:
        self.clock, self.block, self._files = StageClock(), block, files
        self._transfers = transfers
        self._input = self._output = transfers.host(0)

    def active(self) -> AbstractContextManager[Any]:
        return self._transfers.active()

    def load(
        self, refs: Sequence[Tensor], start: int, stop: int, *, base: bool, deltas: bool
    ) -> LoadedBlock:
        wide = any(ref.dtype == "F64" for ref in refs)
        brought = self._bring(refs, start, stop)
        arrays = [decode(raw, r.dtype, wide=wide) for raw, r in zip(brought, refs, strict=True)]
        finite = all_finite(arrays)
        base_values = arrays.pop(0) if base else None
        return LoadedBlock(
            base_values, [a.sub_(base_values) for a in arrays] if deltas else arrays, finite
        )

    def _bring(self, refs: Sequence[Tensor], start: int, stop: int) -> list[Any]:
        """The stored bytes of each tensor's elements [start, stop) on the device, to be kept."""
        sizes = [(stop - start) * width_of(ref.dtype) for ref in refs]
        self._transfers.wait_up()
        if sum(sizes) > self._input.numel():
            self._input = self._transfers.host(sum(sizes))
        on_device, begin = [], 0
        for ref, size in zip(refs, sizes, strict=True):
            host = self._input[begin : begin + size]
            self._files.read(self.clock, ref, start, host.numpy().data)
            on_device.append(self._transfers.up(host))
            begin += size
        return on_device

    def store(self, values: Any, dtype: str, path: Path, offset: int) -> bool:
        import torch

        rounded, fits = encode(values, dtype)
        self._give(rounded.view(torch.uint8), path, offset)
        return fits

    def fetch(self, values: Any) -> Any:
        import numpy as np
        import torch

        return self._down(values.float().view(torch.uint8)).view(np.float32)

    def read(self, tensor: Tensor, start: int, buffer: memoryview) -> None:
        self._files.read(self.clock, tensor, start, buffer)

    def write(self, data: memoryview, path: Path, offset: int) -> None:
        self._files.write(self.clock, path, offset, data)

    def _give(self, stored: Any, path: Path, offset: int) -> None:
        """Bytes on the device into a file."""
        self.write(self._down(stored).data, path, offset)

    def _down(self, stored: Any) -> Any:
        """Bytes of the device in the worker's pinned buffer: numpy uint8, until the next call."""
        if stored.numel() > self._output.numel():
            self._output = self._transfers.host(stored.numel())
        host = self._output[: stored.numel()]
        self._transfers.down(stored, host)
        self._transfers.wait()
        return host.numpy()

    def close(self) -> None:
        """Wait, so that no copy outlives its buffer."""
        self._transfers.wait()


def cuda_worker(files: Files, index: int, block: int) -> StagedWorker:
    """A worker on the CUDA device of this number."""
    return StagedWorker(files, CudaTransfers(index), block)
