"""Where the sources' weights wait while they are read again and again: device, host or disk.

Training and searches read every source many times over. The nearest place that has room is chosen,
with the reason, which plans show.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from merge_cli.checkpoint.headers import TensorRef
from merge_cli.engine.device import free_memory
from merge_cli.errors import ResourceError
from merge_cli.system.machine import show_size

Residency = Literal["device", "host", "disk"]
RESIDENCY = {"device": "on the device", "host": "in memory", "disk": "read from disk each time"}
# Of free memory, where what runs beside the sources is not known: activations, logits, caches.
_DEVICE_SHARE, _HOST_SHARE = 0.6, 0.5
# Left free where it is known: for the driver's context, and for memory that lies in pieces.
_RESERVE, _RESERVE_SHARE = 1_000_000_000, 0.03


def reserve(free: int) -> int:
    """Bytes of free memory that are left free: 1 GB and 3 %, or a tenth where memory is small."""
    return min(_RESERVE + int(_RESERVE_SHARE * free), free // 10)


@dataclass(frozen=True)
class SourceResidency:
    """Where the sources' weights wait, why there, and how many bytes they are."""

    residency: Residency
    reason: str
    bytes: int


def choose_residency(
    size: int,
    device: int | None,
    *,
    shared_with: str = "model",
    on_device: int = 0,
    on_host: int = 0,
    workers: int = 1,
    requested: str = "auto",
    memory: int | None = None,
    exact: bool = False,
) -> SourceResidency:
    """Where `size` bytes of weights should wait.

    Args:
        device: number of the CUDA device that computes; None on a CPU.
        shared_with: what else is there, for the reason: model, student.
        on_device, on_host: bytes that it takes.
        workers: processes with a copy of the weights each; they share one device.
        requested: auto, device, host or disk.
        memory: bytes of a card that is not here, instead of what is free on `device`.
        exact: `on_device` and `on_host` are all that runs beside the sources, so that only a
            reserve is left free; otherwise a share of the memory is.

    Raises:
        ResourceError: what is requested does not fit.
    """

    def left(free: int, share: float, reserved: int) -> int:
        usable = free - reserve(free) if exact else int(free * share)
        return usable // workers - reserved

    host = left(free_memory("cpu", ()), _HOST_SHARE, on_host)
    room = 0
    if device is not None:
        free = memory if memory is not None else free_memory("cuda", (device,))
        room = left(free, _DEVICE_SHARE, on_device)
    if requested == "disk":
        return SourceResidency("disk", "asked for", size)
    if requested == "device" and device is None:
        reason = f"asked for device, and the {shared_with} is on the CPU"
        return SourceResidency("host", reason, size)
    if requested != "auto":
        free = room if requested == "device" else host
        if size > free:
            message = f"residency {requested}: the sources take {show_size(size)}, and "
            message += f"{show_size(max(free, 0))} are left for them"
            raise ResourceError(message, hint="Use `residency: auto` or `disk`.")
        return SourceResidency("device" if requested == "device" else "host", "asked for", size)
    if device is not None and size <= room:
        return SourceResidency("device", f"{show_size(size)} fit beside the {shared_with}", size)
    if size <= host:
        why = ""
        if device is not None:
            why = f"{show_size(size)} do not fit beside the {shared_with}, which leaves "
            why += f"{show_size(max(room, 0))} of the device; "
        return SourceResidency("host", f"{why}{show_size(size)} fit in memory", size)
    reason = f"{show_size(size)}, and room for {show_size(max(host, 0))} in memory"
    return SourceResidency("disk", reason, size)


def stored_bytes(tensors: Iterable[TensorRef]) -> int:
    """Bytes of stored tensors, each counted once."""
    return sum({(ref.path, ref.offset): ref.nbytes for ref in tensors}.values())
