"""The sources' stored bytes in memory, behind the interfaces through which the engine reads files.

What the engine computes with is the same bytes that lie on disk, so that a candidate's weights are
the same bits that a merge of its recipe writes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from merge_cli.checkpoint.header import DTYPES, TensorRef
from merge_cli.checkpoint.raw import FilePool, read_into
from merge_cli.checkpoint.tensors import Tensor
from merge_cli.engine.device import Device
from merge_cli.engine.lanes import Files, StageClock, WorkerContext
from merge_cli.engine.staging import CudaTransfers, StagedWorker
from merge_cli.evaluation.live import free_memory
from merge_cli.sizes import show_size

_HOST_SHARE, _DEVICE_SHARE = 0.5, 0.6  # of free memory; the live model and others take the rest
Residency = Literal["device", "host", "disk"]


@dataclass(frozen=True)
class SourcesInMemory:
    """Where the sources' bytes wait, and why there."""

    residency: Residency
    reason: str
    bytes: int


def choose_residency(
    refs: Iterable[TensorRef], device: Device, workers: int = 1, model: int = 0
) -> SourcesInMemory:
    """The device beside the live model, else host memory for all workers' copies, else the disk.

    Args:
        model: bytes of the live model.
    """
    size = sum(ref.nbytes for ref in {(r.path, r.offset): r for r in refs}.values())
    shown, small = show_size(size), ""
    if device.kind == "cuda":
        # A worker has one device; those of a pool share the first.
        room = int(free_memory("cuda", device.indexes[:1]) * _DEVICE_SHARE) // workers - model
        if size <= room:
            return SourcesInMemory("device", f"{shown} fit beside the model", size)
        small = f"{shown} do not fit beside the model; "
    room = int(free_memory("cpu", ()) * _HOST_SHARE) // workers
    if size <= room:
        return SourcesInMemory("host", f"{small}{shown} fit in memory", size)
    return SourcesInMemory("disk", f"{shown}, and room for {show_size(room)} in memory", size)


class InMemoryFiles(Files):
    """Sources from memory (or disk), outputs into buffers.

    Args:
        device: torch's word for where sources of the residency `device` wait.

    Attributes:
        outputs: for each path that is written to, uint8 (numpy; torch with the residency `device`);
            put here before, taken out after.
        on_device: stored tensors that wait there, torch uint8.
    """

    def __init__(self, place: SourcesInMemory, device: str = "cpu") -> None:
        self._disk = FilePool(os.O_RDONLY)
        super().__init__(self._disk, self._disk)
        self._place, self._device = place, device
        self._kept: dict[tuple[Path, int], memoryview] = {}
        self.on_device: dict[tuple[Path, int], Any] = {}
        self.outputs: dict[Path, Any] = {}

    def buffer(self, size: int) -> Any:
        """What an output of so many bytes is written into."""
        if self._place.residency == "device":
            import torch

            return torch.empty(size, dtype=torch.uint8, device=self._device)
        import numpy as np

        return np.empty(size, np.uint8)

    def keep(self, refs: Iterable[TensorRef]) -> None:
        """Read tensors into memory, unless the place is the disk; each once."""
        if self._place.residency == "disk":
            return
        for ref in refs:
            where = ref.path, ref.offset
            if where in self._kept or where in self.on_device:
                continue
            buffer = memoryview(bytearray(ref.nbytes))
            if ref.nbytes:
                read_into(self._disk, ref.path, ref.offset, buffer, ref.model)
            if self._place.residency == "device":
                import torch

                host = torch.frombuffer(buffer, dtype=torch.uint8) if ref.nbytes else torch.empty(0)
                self.on_device[where] = host.to(self._device, torch.uint8)
            else:
                self._kept[where] = buffer

    def ask_for(self, ref: TensorRef, start: int, size: int) -> None:
        if self._place.residency == "disk":
            super().ask_for(ref, start, size)

    def read_stored(
        self, clock: StageClock, ref: TensorRef, start: int, buffer: memoryview
    ) -> None:
        kept = self._kept.get((ref.path, ref.offset))
        if kept is None:  # on the disk; or on the device, and wanted here for once
            super().read_stored(clock, ref, start, buffer)
            return
        began = time.perf_counter()
        offset = start * DTYPES[ref.dtype][0]
        view = buffer.cast("B")
        view[:] = kept[offset : offset + len(view)]
        clock.read += time.perf_counter() - began
        clock.bytes_read += len(view)

    def write(self, clock: StageClock, path: Path, offset: int, data: memoryview) -> None:
        self._put(path, offset, data)
        clock.bytes_written += data.nbytes

    def copy(
        self, clock: StageClock, ref: TensorRef, start: int, size: int, path: Path, offset: int
    ) -> None:
        buffer = memoryview(bytearray(size))
        self.read_stored(clock, ref, start // DTYPES[ref.dtype][0], buffer)
        self._put(path, offset, buffer)

    def close(self) -> None:
        """Let go of files and memory."""
        self._disk.close()
        self._kept.clear()
        self.on_device.clear()

    def _put(self, path: Path, offset: int, data: memoryview) -> None:
        import numpy as np

        raw = np.frombuffer(data.cast("B"), np.uint8)
        target = self.outputs[path][offset : offset + len(raw)]
        if isinstance(target, np.ndarray):
            target[:] = raw
        else:
            import torch

            target.copy_(torch.from_numpy(raw.copy()))


class InMemoryWorker(StagedWorker):
    """A lane whose operands wait on the device, and whose results stay there."""

    _files: InMemoryFiles

    def _bring(self, refs: Sequence[Tensor], start: int, stop: int) -> list[Any]:
        return [self._own(ref, start, stop) for ref in refs]

    def _own(self, tensor: Tensor, start: int, stop: int) -> Any:
        (ref, *others) = tensor.stored
        kept = None if others or tensor.formula else self._files.on_device.get(_where(ref))
        if kept is None:  # computed on the way, on the host
            return super()._bring([tensor], start, stop)[0]
        width = DTYPES[tensor.dtype][0]
        # A copy: what is computed with may be changed in place.
        return kept[start * width : stop * width].clone()

    def _give(self, stored: Any, path: Path, offset: int) -> None:
        self._files.outputs[path][offset : offset + stored.numel()].copy_(stored)
        self._transfers.wait()  # another lane, on another stream, may look at the whole tensor next


def _where(ref: TensorRef) -> tuple[Path, int]:
    return ref.path, ref.offset


def in_memory_workers(
    files: InMemoryFiles, device: Device, block: int
) -> Callable[[int], WorkerContext]:
    """What makes a pool's lanes over sources that wait on a CUDA device."""
    return lambda number: InMemoryWorker(files, CudaTransfers(device.indexes[0]), block)
