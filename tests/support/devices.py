"""A device made of host memory that is strict about waiting."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch


class StrictTransfers:
    """Copies that take until somebody waits for them.

    What went up must not have changed when it is waited for, and what comes down is not there
    before.
    """

    def __init__(self) -> None:
        self._up: list[tuple[Any, Any]] = []
        self._down: list[tuple[Any, Any]] = []
        self.largest = 0

    def active(self) -> Any:
        return nullcontext()

    def host(self, size: int) -> Any:
        self.largest = max(self.largest, size)
        return torch.full((size,), 0xAA, dtype=torch.uint8)

    def up(self, host: Any) -> Any:
        self._up.append((host, host.clone()))
        return host.clone()

    def down(self, device: Any, host: Any) -> None:
        host.fill_(0x55)
        self._down.append((device.clone(), host))

    def wait_up(self) -> None:
        for host, before in self._up:
            assert torch.equal(host, before), "a buffer was used again while it was copied"
        self._up.clear()

    def wait(self) -> None:
        self.wait_up()
        for device, host in self._down:
            host.copy_(device)
        self._down.clear()
