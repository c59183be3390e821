"""Copying the next tensor's sources to a GPU while the student computes with this one.

Gradients come in the same order in every backward pass, so it is known which tensor is next. Copies
run on a stream of their own, from pinned memory; two tensors at most wait on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


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
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def start(self, rows: Any) -> Any:
        import torch

        with torch.cuda.stream(self._stream):
            copy = rows.to(self._device, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
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
        self._started[name] = {number: self._copies.start(one) for number, one in rows}
        while len(self._started) > 2:
            self._started.pop(next(iter(self._started)))

    def take(self, name: str, number: int) -> Any:
        """A whole tensor that was brought; None where nobody asked for it."""
        started = self._started.get(name, {}).get(number)
        return None if started is None else self._copies.finish(started)
