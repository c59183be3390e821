"""How much memory a merge may use, how it is shared out, and how much it has used.

What a lane holds at once is known: a block of every input as it is stored, upcast, and what the
method makes of it. Everything else is the interpreter, its libraries and the plan.
"""

from __future__ import annotations

import os
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

from merge_cli.engine.device import Device, choose_arithmetic
from merge_cli.engine.options import MergeOptions
from merge_cli.engine.plan import Plan
from merge_cli.errors import UsageError
from merge_cli.kernels.reduce import BLOCK_MULTIPLE

MINIMUM_MEMORY = 500_000_000
# Measured with scripts/bench.py: the interpreter with its libraries, and what torch adds.
_RUNTIME = 210_000_000
_TORCH = 190_000_000
_TENSOR = 2_500  # what the plan and the report hold for each tensor of each model
_HOST_BLOCK = 2 * BLOCK_MULTIPLE  # 512 KiB an operand: L2, and never a page fault to allocate
_TEMPORARIES = 6  # arrays of a block that a method makes besides its operands
_SEARCH = 24 * 2**20  # for each operand: the sample and histograms of an exact threshold
_GPU_LANES = 4  # on one device: one reads, one copies, one computes, one writes
_GPU_BLOCK = 64 * BLOCK_MULTIPLE


@dataclass(frozen=True)
class LaneRoom:
    """What each lane may use.

    Attributes:
        lanes: how many there are.
        block: elements of a block.
        bytes: what a lane holds on the host.
    """

    lanes: int
    block: int
    bytes: int


def lane_room(plan: Plan, device: Device, options: MergeOptions) -> LaneRoom:
    """As many lanes as there are threads, or as the memory holds; larger blocks on a GPU.

    Raises:
        UsageError: less memory than a merge can work in.
    """
    if options.max_memory < MINIMUM_MEMORY:
        what = f"--max-memory of {options.max_memory / 1e6:.0f} MB is too little"
        raise UsageError(what, hint=f"Give it at least {MINIMUM_MEMORY / 1e6:.0f} MB.")
    inputs = max((len(task.inputs) for task in plan.tasks), default=1)
    free = max(0, options.max_memory - _fixed(plan, device))
    if device.kind == "cpu":
        # Stored bytes of the widest format once, everything else upcast.
        each = _HOST_BLOCK * (8 + 4 * (inputs + _TEMPORARIES))
        threads = options.threads or usable_cores()
        return LaneRoom(max(1, min(threads, free // each)), _HOST_BLOCK, each)
    lanes = _GPU_LANES * len(device.indexes)
    width = 8 * (inputs + 1)  # pinned: every input and the output
    block = min(_GPU_BLOCK, free // (lanes * width))
    block = max(1, block // BLOCK_MULTIPLE) * BLOCK_MULTIPLE
    return LaneRoom(lanes, block, block * width)


def estimated_peak(plan: Plan, device: Device, options: MergeOptions) -> int:
    """What the process will hold at its peak, from the plan alone."""
    room = lane_room(plan, device, options)
    return _fixed(plan, device) + room.lanes * room.bytes


def usable_cores() -> int:
    """Cores that this process may run on: a batch system often grants fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _fixed(plan: Plan, device: Device) -> int:
    """What does not depend on the lanes."""
    torch = device.kind == "cuda" or choose_arithmetic(plan)[0] == "torch"
    headers = sum(len(source.tensors) for source in plan.sources) + len(plan.tasks)
    searched = max((len(task.operands) for task in plan.tasks), default=1)
    search = _SEARCH * searched if plan.method.name == "ties" else 0
    return _RUNTIME + _TORCH * torch + _TENSOR * headers + search


def peak_rss() -> int:
    """The largest resident size that this process has had, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        # Linux's ru_maxrss is inherited from the process that started us, however large that was.
        line = next((x for x in status.read_text().splitlines() if x.startswith("VmHWM:")), None)
        if line is not None:
            return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
