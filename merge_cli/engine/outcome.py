"""What a merge did, for the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from merge_cli.engine.device import Device
from merge_cli.engine.lanes import WorkerContext
from merge_cli.engine.statistics import TensorStats


@dataclass(frozen=True)
class StageTime:
    """What the threads did of one kind, together; `bytes` is 0 for waiting."""

    seconds: float
    threads: int
    bytes: int


@dataclass(frozen=True)
class MergeStats:
    """What the loop did, for the report.

    Attributes:
        key: the digest of the work, by which OUT can be recognised as its result.
        arithmetic: compiled, triton or torch, and why torch.
        buffers: bytes that all lanes may hold.
        stages: read, compute, write, stall.
        stats: one for each task of the plan.
        resumed: bytes of output that an earlier run had merged.
        seconds: wall time of the loop, and of the survey before it.
    """

    key: str
    device: Device
    arithmetic: str
    threads: int
    buffers: int
    stages: Mapping[str, StageTime]
    stats: list[TensorStats]
    resumed: int
    seconds: float
    survey_seconds: float


def stages(lanes: Sequence[WorkerContext], threads: int, seconds: float) -> dict[str, StageTime]:
    """The lanes' clocks together; what is left of the threads' time is stall."""
    clocks = [lane.clock for lane in lanes]
    read, compute, write = (
        sum(getattr(clock, name) for clock in clocks) for name in ("read", "compute", "write")
    )
    bytes_read = sum(clock.bytes_read for clock in clocks)
    return {
        "read": StageTime(read, threads, bytes_read),
        "compute": StageTime(compute, threads, bytes_read),
        "write": StageTime(write, threads, sum(clock.bytes_written for clock in clocks)),
        "stall": StageTime(max(0.0, threads * seconds - read - compute - write), threads, 0),
    }
