"""Choose where to compute and with what, and give the reason, which the plan shows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from merge_cli.errors import ResourceError, UsageError
from merge_cli.kernels.convert import COMPILED
from merge_cli.options import MergeOptions
from merge_cli.planning.plan import Plan
from merge_cli.system import machine
from merge_cli.system.libraries import require
from merge_cli.system.machine import parse_size, show_size

# What a driver leaves in the file system: NVIDIA's, AMD's, and the one of Windows' Linux.
_GPU_FILES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
_LEAST_FREE = 1_000_000_000
Arithmetic = Literal["compiled", "torch"]


@dataclass(frozen=True)
class Device:
    """Where to compute and why there.

    Attributes:
        kind: `cpu` or `cuda`.
        indexes: the CUDA devices that share the tensors; empty on a CPU.
        name: for the report.
        memory: bytes of a card that is planned for; None for devices that are here.
    """

    kind: Literal["cpu", "cuda"]
    indexes: tuple[int, ...]
    name: str
    reason: str
    memory: int | None = None


def choose_device(requested: str, *, planned: bool = False) -> Device:
    """`auto` takes CUDA where there is some; `cpu`, `cuda` and `cuda:N` are taken at their word.

    Without a number every CUDA device that is visible takes part. torch is asked only where the
    system has a driver; a merge on a CPU does without it. `cuda:80GB` is a card of that size: a
    plan takes it as given, whether there is one here or not; what runs takes the first one here
    that is as large.

    Args:
        planned: nothing will run.

    Raises:
        UsageError: not a device that this tool knows.
        ResourceError: a CUDA device that this machine or this torch build does not have, or one
            whose memory is taken.
    """
    kind, _, number = requested.partition(":")
    if kind == "cuda" and number and not number.isdigit():
        size = parse_size(number, "--device")
        if planned:
            return Device("cuda", (0,), f"a card of {show_size(size)}", "planned for", size)
        return choose_device(device_here(requested))
    if kind not in ("auto", "cpu", "cuda") or (number and kind != "cuda"):
        hint = "Use auto, cpu, cuda or cuda:N; for a plan cuda:80GB, too."
        raise UsageError(f"unknown device '{requested}'", hint=hint)
    if kind == "cpu":
        return Device("cpu", (), "cpu", "asked for")
    if kind == "auto" and not any(Path(file).exists() for file in _GPU_FILES):
        return Device("cpu", (), "cpu", "no CUDA device found")
    if kind == "auto":
        try:
            import torch
        except (ImportError, OSError) as error:  # none, or a build that cannot be loaded here
            why = str(error).strip().partition("\n")[0]
            return Device("cpu", (), "cpu", f"torch cannot be imported: {why}")
    torch = require("torch", f"--device {requested}")
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "auto" and not available:
        built = torch.version.cuda is not None
        why = "no CUDA device found" if built else "this torch is built without CUDA"
        return Device("cpu", (), "cpu", why)
    indexes = (int(number),) if number else tuple(range(available))
    if not indexes or indexes[-1] >= available:
        message = f"device '{requested}' is not there: {available} CUDA devices found"
        raise ResourceError(message, hint="Use --device cpu, or install a torch built for CUDA.")
    roomy = tuple(i for i in indexes if torch.cuda.mem_get_info(i)[0] >= _LEAST_FREE)
    if not roomy:
        free = max(torch.cuda.mem_get_info(i)[0] for i in indexes) / 1e9
        message = f"{free:.1f} GB of device memory free, {_LEAST_FREE / 1e9:.0f} GB needed"
        if kind == "auto":
            return Device("cpu", (), "cpu", f"a CUDA device was found, but with {message}")
        raise ResourceError(message, hint="Free some, or use --device cpu.")
    name = torch.cuda.get_device_name(roomy[0])
    name = name if len(roomy) == 1 else f"{len(roomy)} x {name}"
    return Device("cuda", roomy, name, "found" if kind == "auto" else "asked for")


def device_of(options: MergeOptions) -> Device:
    """Where a merge runs: on this machine, or on every node of a Ray cluster.

    What the nodes have is not looked at here: `auto` is the CPU there, so that the bytes do not
    depend on which nodes a cluster has today.

    Raises:
        UsageError: a device by its number, on a cluster.
        Others as `choose_device` does.
    """
    if options.ray is None:
        return choose_device(options.device)
    if options.device not in ("auto", "cpu", "cuda"):
        hint = "Ray numbers the devices: use --device cpu or --device cuda."
        raise UsageError(f"'{options.device}' cannot be chosen on a cluster", hint=hint)
    if options.device == "cuda":
        return Device("cuda", (), "the GPUs of the nodes", "asked for")
    reason = "asked for" if options.device == "cpu" else "what a cluster computes on by default"
    return Device("cpu", (), "the CPUs of the nodes", reason)


def device_here(requested: str) -> str:
    """A card that is given by its size as the number of one here; other devices as they are.

    Raises:
        UsageError: not a size.
        ResourceError: no card here is as large.
    """
    kind, _, number = requested.partition(":")
    if kind != "cuda" or not number or number.isdigit():
        return requested
    size = parse_size(number, "--device")
    if any(Path(file).exists() for file in _GPU_FILES):
        import torch

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        # A card sold as 80 GB has a little more or less.
        large = [i for i in range(count) if torch.cuda.mem_get_info(i)[1] >= 0.95 * size]
        if large:
            return f"cuda:{large[0]}"
    message = f"'{requested}' is for plans: no card of {show_size(size)} is here to run on"
    raise ResourceError(message, hint="Use --device auto, or plan with `merge-cli plan`.")


def free_memory(kind: str, indexes: tuple[int, ...]) -> int:
    """Free bytes of these CUDA devices together, or of the machine."""
    if kind == "cuda":
        import torch

        return sum(torch.cuda.mem_get_info(i)[0] for i in indexes)
    return machine.free_memory()


def choose_arithmetic(plan: Plan) -> tuple[Arithmetic, str]:
    """Compiled loops over numpy arrays, or torch, for a merge on a CPU; and why."""
    from merge_cli.kernels import compiled

    if not plan.method.supports_numpy:
        return "torch", f"{plan.method.name} works on tensors"
    others = plan.computed_dtypes - COMPILED
    if others:
        return "torch", f"{', '.join(sorted(others))} among the tensors"
    missing = compiled.available()
    return ("torch", missing) if missing else ("compiled", "")
