"""The work itself: the plan's units through the pipeline, from a journal's state to the end."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from merge_cli.checkpoint.header import DTYPES
from merge_cli.checkpoint.raw import FilePool, write_error, write_from
from merge_cli.engine.compute import Computer
from merge_cli.engine.device import Device
from merge_cli.engine.journal import Journal
from merge_cli.engine.memory import window_bytes
from merge_cli.engine.operands import Arithmetic, read_span
from merge_cli.engine.options import MergeOptions, Progress, Show
from merge_cli.engine.pipeline import Pipeline, StageClock, Window
from merge_cli.engine.plan import Plan
from merge_cli.engine.statistics import TensorStats
from merge_cli.engine.units import Unit, cut_units
from merge_cli.engine.workfolder import sync
from merge_cli.errors import NonFiniteError, ResourceError

if TYPE_CHECKING:
    from torch import Tensor

_SYNC_BYTES = 2_000_000_000
_GPU_COMPUTERS = 2  # one computes while another copies; each holds blocks of every operand
_SURVEY = "reading the whole model first, for thresholds over all of it"


@dataclass(frozen=True)
class Outcome:
    """What the loop did, for the report.

    Attributes:
        key: the digest of the work, by which OUT can be recognised as its result.
        stats: one for each task of the plan.
        resumed: bytes of output that an earlier run had merged.
        seconds: wall time of the loop, and of the survey before it.
    """

    key: str
    device: Device
    threads: int
    window: Window
    clocks: dict[str, StageClock]
    stats: list[TensorStats]
    resumed: int
    seconds: float
    survey_seconds: float


def run_loop(
    plan: Plan, model: Path, journal: Journal, device: Device, options: MergeOptions, show: Show
) -> Outcome:
    """Merge every unit that the journal does not have yet.

    Args:
        model: the folder with the allocated shards.

    Raises:
        SourceError: a source vanished, is truncated, or holds NaN or Inf.
        ResourceError: disk or memory ran out.
        KeyboardInterrupt: as it comes, after every thread has ended.
    """
    threads = options.threads or usable_cores()
    computers = threads if device.torch_device.type == "cpu" else min(threads, _GPU_COMPUTERS)
    arithmetic = Arithmetic(
        device.torch_device,
        plan.recipe.seed,
        "deltas" in plan.method.supplied,
        options.allow_non_finite,
    )
    sources, shards = FilePool(os.O_RDONLY), FilePool(os.O_RDWR)
    computer = Computer(plan, arithmetic, sources, statistics=options.statistics)
    places = {
        name: (model / shard.file, offset)
        for shard in plan.shards
        for name, offset in shard.offsets.items()
    }
    units = cut_units(plan.tasks)
    stats = [TensorStats() for _ in plan.tasks]
    for number, earlier in journal.done.items():
        task = plan.tasks[units[number].task]
        if any(earlier.non_finite) and not options.allow_non_finite:
            what = "an interrupted run merged NaN or Inf, which was allowed then"
            hint = "Allow it again with --allow-non-finite, or start over with --fresh."
            raise NonFiniteError(what, tensor=task.name, hint=hint)
        stats[units[number].task].add(earlier)
    remaining = [unit for unit in units if unit.number not in journal.done]
    total = sum(_output_bytes(plan, unit) for unit in units)
    done = resumed = total - sum(_output_bytes(plan, unit) for unit in remaining)
    unsynced = 0

    def read(unit: Unit) -> list[Tensor]:
        refs = plan.tasks[unit.task].inputs
        return [read_span(sources, ref, unit.start, unit.stop) for ref in refs]

    def write(unit: Unit, data: Tensor, unit_stats: TensorStats) -> None:
        task = plan.tasks[unit.task]
        path, offset = places[task.name]
        if data.numel():
            at = offset + unit.start * DTYPES[task.dtype][0]
            write_from(shards, path, at, memoryview(data.numpy().data))
        journal.record(unit.number, unit_stats)

    def on_done(unit: Unit, unit_stats: TensorStats) -> None:
        nonlocal done, unsynced
        size = _output_bytes(plan, unit)
        done += size
        unsynced += size
        stats[unit.task].add(unit_stats)
        if options.fsync and unsynced > _SYNC_BYTES:
            _sync_units(journal, model, plan)
            unsynced = 0
        show(Progress("merge", done, total))

    widest = max((len(task.inputs) for task in plan.tasks), default=1)
    pipeline = Pipeline(
        read=read,
        compute=computer.run,
        write=write,
        cost=lambda unit: unit.cost(plan.tasks[unit.task]),
        window=Window(window_bytes(options.max_memory, threads, widest)),
        computers=computers,
        on_done=on_done,
    )
    began = time.perf_counter()
    try:
        with _one_torch_thread(), _memory_errors():
            if remaining:
                computer.survey(lambda: show(Progress("survey", 0, 0, _SURVEY)))
            surveyed = time.perf_counter()
            show(Progress("merge", done, total, "resumed" if resumed else ""))
            pipeline.run(remaining)
    finally:
        sources.close()
        shards.close()
    return Outcome(
        key=journal.key,
        device=device,
        threads=computers,
        window=pipeline.window,
        clocks=pipeline.clocks,
        stats=stats,
        resumed=resumed,
        seconds=time.perf_counter() - surveyed,
        survey_seconds=surveyed - began,
    )


def usable_cores() -> int:
    """Cores that this process may run on: a batch system often grants fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _sync_units(journal: Journal, model: Path, plan: Plan) -> None:
    # Counted before the wait: what is written meanwhile may not be covered by it.
    count = journal.count
    try:
        sync([*(model / shard.file for shard in plan.shards), model, model.parent])
    except OSError as error:
        raise write_error(error, model) from error
    journal.synced(count)


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Blocks are the parallelism here; torch's own threads would fight over the same cores."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _memory_errors() -> Iterator[None]:
    """Say in our own words that memory ran out, on the host or on the device."""
    import torch

    hint = "Give it less: a lower --max-memory, fewer --threads, or --device cpu. It resumes."
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise ResourceError("the device's memory ran out", hint=hint) from error
    except MemoryError as error:
        raise ResourceError("memory ran out", hint=hint) from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        raise ResourceError("memory ran out", hint=hint) from error


def _output_bytes(plan: Plan, unit: Unit) -> int:
    return (unit.stop - unit.start) * DTYPES[plan.tasks[unit.task].dtype][0]
