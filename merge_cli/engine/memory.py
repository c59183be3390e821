"""How much memory a merge may use, and how much it has used."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

from merge_cli.engine.plan import Plan
from merge_cli.engine.units import cut_units
from merge_cli.errors import UsageError

DEFAULT_MEMORY = 1_250_000_000
# The interpreter with torch imported, and the blocks that a thread works on.
_RUNTIME = 380_000_000
_SCRATCH_BLOCKS = 6
# What the allocator holds for each byte in flight: buffers of many sizes come and go, and some of
# what is freed stays with the process. Measured with scripts/bench_memory.py.
_ALLOCATOR = 1.5
_BLOCK_BYTES = 4 * 262_144
MINIMUM_MEMORY = 500_000_000


def window_bytes(max_memory: int, threads: int, operands: int) -> int:
    """The bytes in flight that keep the whole process under `max_memory`.

    Raises:
        UsageError: less than a merge can work in.
    """
    if max_memory < MINIMUM_MEMORY:
        what = f"--max-memory of {max_memory / 1e6:.0f} MB is too little"
        raise UsageError(what, hint=f"Give it at least {MINIMUM_MEMORY / 1e6:.0f} MB.")
    return max(1, int((max_memory - _RUNTIME - _scratch(threads, operands)) / _ALLOCATOR))


def estimated_peak(plan: Plan, max_memory: int, threads: int) -> int:
    """What the process will hold at its peak, from the plan alone."""
    operands = max((len(task.inputs) for task in plan.tasks), default=1)
    window = window_bytes(max_memory, threads, operands)
    units = cut_units(plan.tasks)
    costs = [unit.cost(plan.tasks[unit.task]) for unit in units]
    in_flight = min(sum(costs), max(window, max(costs, default=0)))
    return _RUNTIME + _scratch(threads, operands) + int(in_flight * _ALLOCATOR)


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


def _scratch(threads: int, operands: int) -> int:
    return threads * (operands + _SCRATCH_BLOCKS) * _BLOCK_BYTES
