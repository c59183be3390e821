"""Choosing where to compute, with the reason, which is shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from merge_cli.errors import ResourceError, UsageError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Device:
    """A torch device and why it was chosen."""

    torch_device: torch.device
    name: str
    reason: str


def choose_device(wanted: str) -> Device:
    """`auto` takes CUDA where there is one; `cpu`, `cuda` and `cuda:N` are taken at their word.

    Raises:
        UsageError: not a device that this tool knows.
        ResourceError: a CUDA device that this machine or this torch build does not have.
    """
    import torch

    kind, _, number = wanted.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (number and (kind != "cuda" or not number.isdigit())):
        raise UsageError(f"unknown device '{wanted}'", hint="Use auto, cpu, cuda or cuda:N.")
    if wanted == "cpu":
        return Device(torch.device("cpu"), "cpu", "asked for")
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "auto" and not available:
        built = torch.version.cuda is not None
        why = "no CUDA device found" if built else "this torch is built without CUDA"
        return Device(torch.device("cpu"), "cpu", why)
    index = int(number or 0)
    if index >= available:
        what = f"device '{wanted}' is not there: {available} CUDA devices found"
        raise ResourceError(what, hint="Use --device cpu, or install a torch built for CUDA.")
    name = torch.cuda.get_device_name(index)
    reason = "found" if wanted == "auto" else "asked for"
    return Device(torch.device("cuda", index), name, reason)
