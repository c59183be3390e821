"""A plan carried out: weights fetched, merged, written; reported; published."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_cli.checkpoint.files import copy_companions
from merge_cli.checkpoint.header import DTYPES
from merge_cli.checkpoint.layout import index_json
from merge_cli.checkpoint.raw import FilePool, write_error, write_from
from merge_cli.checkpoint.source import INDEX, fetch_weights
from merge_cli.engine.compute import Computer
from merge_cli.engine.device import Device, choose_device
from merge_cli.engine.journal import Journal, work_key
from merge_cli.engine.memory import DEFAULT_MEMORY, window_bytes
from merge_cli.engine.operands import Arithmetic, read_span
from merge_cli.engine.output import OutputFolder, sync_files
from merge_cli.engine.pipeline import Pipeline, StageClock, Window
from merge_cli.engine.plan import Plan
from merge_cli.engine.statistics import TensorStats
from merge_cli.engine.units import Unit, cut_units
from merge_cli.errors import Interrupted, SourceError

if TYPE_CHECKING:
    from torch import Tensor

_SYNC_BYTES = 2_000_000_000
_SURVEY = "reading the whole model first, for thresholds over all of it"


@dataclass(frozen=True)
class MergeOptions:
    """How a merge is run; none of it changes the bytes.

    Attributes:
        threads: computing threads on a CPU; None means one for each core that may be used.
        max_memory: bytes that the whole process should stay under.
        overwrite: replace an existing output.
        fresh: do not resume.
        statistics: measure norms, cosines and signs on the way, for the report.
        fsync: publish only when the bytes are on the disk itself, safe against power failure.
        allow_non_finite: merge NaN and Inf as they are.
        trust_remote_code: copy the donor's Python files.
        copy_tokenizer: copy tokenizer files.
    """

    device: str = "auto"
    threads: int | None = None
    max_memory: int = DEFAULT_MEMORY
    overwrite: bool = False
    fresh: bool = False
    statistics: bool = True
    fsync: bool = False
    allow_non_finite: bool = False
    trust_remote_code: bool = False
    copy_tokenizer: bool = True


@dataclass(frozen=True)
class Progress:
    """A message to whoever shows progress. `done` and `total` are bytes of the stage named."""

    stage: str
    done: int
    total: int
    note: str = ""


@dataclass(frozen=True)
class Outcome:
    """What the loop did, for the report.

    Attributes:
        stats: one for each task of the plan.
        fingerprints: one for each source of the plan.
        resumed: bytes that an earlier run had merged.
        seconds: wall time of the loop, and of the survey before it.
    """

    device: Device
    threads: int
    window: Window
    clocks: dict[str, StageClock]
    stats: list[TensorStats]
    fingerprints: tuple[str, ...]
    resumed: int
    seconds: float
    survey_seconds: float


Show = Callable[[Progress], None]
Finish = Callable[[Plan, Outcome, Path], None]


def execute(plan: Plan, target: Path, options: MergeOptions, *, show: Show, finish: Finish) -> Path:
    """Merge into `target`.

    Args:
        show: told of progress, in the calling thread.
        finish: writes reports into the finished folder before it is published.

    Returns:
        the published folder.

    Raises:
        UsageError, ResourceError: the target cannot be used, the disk is full.
        SourceError: a source vanished, is truncated, or holds NaN or Inf.
        Interrupted: Ctrl-C or SIGTERM; the same command resumes.
    """
    output = OutputFolder(target)
    output.refuse_existing(options.overwrite)
    if options.fresh:
        output.discard()
    output.check_space(plan.bytes_written)
    _fetch(plan, show)
    fingerprints = _verified_fingerprints(plan)
    key = work_key(plan)
    journal = Journal(output.partial, key)
    try:
        if journal.stale:
            show(
                Progress("start", 0, 0, f"{output.partial.name} is of another merge: starting over")
            )
        if not output.allocate(plan.shards) and journal.done:
            journal.restart(key)
        outcome = _merge(plan, output, journal, options, fingerprints, show)
        _write_companions(plan, output.model, options)
        finish(plan, outcome, output.model)
        if options.fsync:
            sync_files([p for p in output.model.rglob("*") if p.is_file()])
        output.publish(options.overwrite)
    except KeyboardInterrupt:
        done = f"{len(journal.done)} units were done before"
        raise Interrupted(
            "stopped", where=str(output.partial), hint="The same command resumes."
        ) from KeyboardInterrupt(done)
    finally:
        journal.close()
    return output.target


def _merge(
    plan: Plan,
    output: OutputFolder,
    journal: Journal,
    options: MergeOptions,
    fingerprints: tuple[str, ...],
    show: Show,
) -> Outcome:
    import torch

    device = choose_device(options.device)
    threads = options.threads or usable_cores()
    labels = {
        ref.path: plan.sources[source].label
        for task in plan.tasks
        for ref, source in zip(task.operands, task.sources, strict=False)
    }
    if plan.base is not None:
        base = plan.sources[plan.base]
        labels |= {ref.path: base.label for ref in base.tensors.values()}
    arithmetic = Arithmetic(
        device.torch_device,
        plan.recipe.seed,
        "deltas" in plan.method.supplied,
        labels,
        options.allow_non_finite,
    )
    sources, shards = FilePool(os.O_RDONLY), FilePool(os.O_RDWR)
    computer = Computer(plan, arithmetic, sources, statistics=options.statistics)
    offsets = {
        name: (output.model / shard.file, offset)
        for shard in plan.shards
        for name, offset in shard.offsets.items()
    }
    units = cut_units(plan.tasks)
    stats = [TensorStats() for _ in plan.tasks]
    for number, earlier in journal.done.items():
        stats[units[number].task].add(earlier)
    remaining = [unit for unit in units if unit.number not in journal.done]
    total = sum(_output_bytes(plan, unit) for unit in units)
    done = resumed = total - sum(_output_bytes(plan, unit) for unit in remaining)

    def read(unit: Unit) -> list[Tensor]:
        refs = plan.tasks[unit.task].inputs
        return [read_span(sources, ref, unit.start, unit.stop, labels) for ref in refs]

    def write(unit: Unit, data: Tensor, unit_stats: TensorStats) -> None:
        task = plan.tasks[unit.task]
        path, offset = offsets[task.name]
        if data.numel():
            at = offset + unit.start * DTYPES[task.dtype][0]
            write_from(shards, path, at, memoryview(data.numpy().data))
        journal.record(unit.number, unit_stats)

    unsynced = 0

    def on_done(unit: Unit, unit_stats: TensorStats) -> None:
        nonlocal done, unsynced
        size = _output_bytes(plan, unit)
        done += size
        unsynced += size
        stats[unit.task].add(unit_stats)
        if options.fsync and unsynced > _SYNC_BYTES:
            sync_files([output.model / shard.file for shard in plan.shards])
            journal.synced()
            unsynced = 0
        show(Progress("merge", done, total))

    widest = max((len(task.inputs) for task in plan.tasks), default=1)
    pipeline = Pipeline(
        read=read,
        compute=computer.run,
        write=write,
        cost=lambda unit: unit.cost(plan.tasks[unit.task]),
        window=Window(window_bytes(options.max_memory, threads, widest)),
        computers=threads,
        on_done=on_done,
    )
    # Blocks are the parallelism here; torch's own threads would fight over the same cores.
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    began = time.perf_counter()
    try:
        if remaining:
            computer.survey(lambda: show(Progress("survey", 0, 0, _SURVEY)))
        surveyed = time.perf_counter()
        show(Progress("merge", done, total, "resumed" if resumed else ""))
        pipeline.run(remaining)
    finally:
        torch.set_num_threads(torch_threads)
        sources.close()
        shards.close()
    ended = time.perf_counter()
    return Outcome(
        device=device,
        threads=threads,
        window=pipeline.window,
        clocks=pipeline.clocks,
        stats=stats,
        fingerprints=fingerprints,
        resumed=resumed,
        seconds=ended - surveyed,
        survey_seconds=surveyed - began,
    )


def usable_cores() -> int:
    """Cores that this process may run on: a batch system often grants fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _output_bytes(plan: Plan, unit: Unit) -> int:
    return (unit.stop - unit.start) * DTYPES[plan.tasks[unit.task].dtype][0]


def _fetch(plan: Plan, show: Show) -> None:
    """Download the shards that the plan reads, of models that are on the Hub."""
    for i, source in enumerate(plan.sources):
        if source.hub is None:
            continue
        wanted = plan.shards_read(i)
        total = sum(source.hub.files.get(name, 0) for name in wanted)
        fetched = 0

        def progress(count: int, label: str = source.label, total: int = total) -> None:
            nonlocal fetched
            fetched += count
            show(Progress("fetch", fetched, total, label))

        fetch_weights(source, wanted, progress)


def _verified_fingerprints(plan: Plan) -> tuple[str, ...]:
    """Each source's fingerprint. A resolved recipe records them: other inputs, other bytes."""
    found = []
    for i, source in enumerate(plan.sources):
        fingerprint = source.fingerprint(plan.shards_read(i))
        recorded = plan.recipe.inputs.get(source.label, fingerprint)
        if recorded != fingerprint:
            what = f"is not the model that this recipe was resolved with ({recorded[:12]})"
            hint = "Restore it, or remove `inputs` from the recipe."
            raise SourceError(what, model=source.label, hint=hint)
        found.append(fingerprint)
    return tuple(found)


def _write_companions(plan: Plan, folder: Path, options: MergeOptions) -> None:
    """config.json, the index, tokenizer and processor files."""
    donor, tokenizer = plan.sources[plan.donor], plan.sources[plan.tokenizer_donor]
    try:
        copy_companions(
            donor.root,
            tokenizer.root if options.copy_tokenizer else None,
            folder,
            code=options.trust_remote_code,
        )
        if plan.config:
            _write_config(plan, donor.root / "config.json", folder / "config.json")
        if len(plan.shards) > 1:
            outputs = [task.output for task in plan.tasks]
            (folder / INDEX).write_text(index_json(plan.shards, outputs), encoding="utf-8")
    except OSError as error:
        raise write_error(error, folder) from error


def _write_config(plan: Plan, donor: Path, target: Path) -> None:
    """The donor's own bytes where nothing changed."""
    if plan.config == plan.sources[plan.donor].config:
        target.write_bytes(donor.read_bytes())
    else:
        text = json.dumps(dict(plan.config), indent=2, ensure_ascii=False) + "\n"
        target.write_text(text, encoding="utf-8")


def summary_of(outcome: Outcome) -> dict[str, Any]:
    """Seconds and GB/s of every stage, as the report holds them."""
    found = {}
    for name, clock in outcome.clocks.items():
        busy = clock.seconds / clock.threads
        found[name] = {
            "thread_seconds": round(clock.seconds, 4),
            "threads": clock.threads,
            "bytes": clock.bytes,
            "gigabytes_per_second": round(clock.bytes / busy / 1e9, 3) if busy else None,
        }
    return found
