"""Execute a plan: fetch and verify the inputs, merge, report, publish."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from merge_cli.engine.device import Device, device_of
from merge_cli.engine.inputs import inputs_of
from merge_cli.engine.journal import Journal, work_key
from merge_cli.engine.loop import run_loop
from merge_cli.engine.merge_stats import MergeStats
from merge_cli.engine.output import OutputWorkspace, clear_companions, open_journal
from merge_cli.errors import CorruptFileError, Interrupted, SourceError
from merge_cli.options import MergeOptions, OnProgress, Progress
from merge_cli.planning.auxiliary import write_auxiliary_files
from merge_cli.planning.equal_tensors import compare
from merge_cli.planning.plan import Plan
from merge_cli.recipe.named_files import named_files
from merge_cli.sources.source import fetch_weights
from merge_cli.system.raw_io import write_error
from merge_cli.system.records import Records

_ANEW = "starting over: earlier work is damaged, or a file that it has read was touched since"
# Writes reports into the folder, given the plan, each source's fingerprint, and the outcome.
Finish = Callable[[Plan, tuple[str, ...], MergeStats, Path], None]
# Merges what the journal does not have yet: `run_loop` here, or on the nodes of a cluster.
Run = Callable[[Plan, Path, Journal, Device, MergeOptions, OnProgress], MergeStats]


def execute(
    plan: Plan,
    target: Path,
    options: MergeOptions,
    *,
    on_progress: OnProgress,
    finish: Finish,
    more_bytes: int = 0,
    run: Run = run_loop,
) -> Path:
    """Merge into `target`.

    Args:
        on_progress: called with progress, in the calling thread.
        finish: writes reports into the finished folder before it is published.
        more_bytes: that `finish` writes, besides small files.
        run: does the work that is left.

    Returns:
        the published folder.

    Raises:
        UsageError, ResourceError: the target cannot be used, the disk is full, memory ran out.
        SourceError: a source vanished, is truncated, has changed meanwhile, or holds NaN or Inf.
        Interrupted: Ctrl-C or SIGTERM; the same command resumes.
    """
    device = device_of(options)
    try:
        with OutputWorkspace(target) as work:
            fetch_inputs(plan, on_progress)
            inputs = inputs_of(plan)
            fingerprints = verified_fingerprints(plan)
            key = work_key(plan, device.kind, options.statistics)
            if not options.fresh and work.published(key):
                work.discard()
                return work.target
            work.refuse(options.overwrite, protected_paths(plan))
            if options.fresh:
                work.discard()
            work.refuse_other_work(key)
            work.check_space(plan.bytes_written + more_bytes)
            differing = compare(plan.compared)
            for note in differing:
                on_progress(Progress("copies", 0, 0, note))
            plan = replace(plan, notes=(*plan.notes, *differing))
            begun = Records.count_of(work.journal)
            journal = open_journal(work, key, plan.shards, inputs.fingerprint)
            if begun and not journal.done:
                on_progress(Progress("merge", 0, 0, _ANEW))
            try:
                outcome = run(plan, work.model, journal, device, options, on_progress)
            except SourceError:
                inputs.verify_or(work.discard)  # what it stumbled over may be a half-written file
                raise
            finally:
                journal.close()
            inputs.verify_or(work.discard)
            clear_companions(work, plan.shards)
            for name, written in (plan.variants or {"": plan}).items():
                write_auxiliary_files(
                    written,
                    work.model / name,
                    tokenizer=options.copy_tokenizer,
                    code=options.trust_remote_code,
                )
            finish(plan, fingerprints, outcome, work.model)
            inputs.verify_or(work.discard)
            work.publish(fsync=options.fsync)
            return work.target
    except OSError as error:
        raise write_error(error, target) from error
    except KeyboardInterrupt:
        where = f"{target}.partial"
        raise Interrupted("stopped", where=where, hint="The same command resumes.") from None


def check_target(plan: Plan, target: Path, options: MergeOptions) -> None:
    """What `execute` would refuse about device, place and disk, without touching anything.

    Raises:
        UsageError, ResourceError: as `execute` does.
    """
    device_of(options)
    work = OutputWorkspace(target)
    try:
        work.refuse(options.overwrite, protected_paths(plan))
        work.check_space(plan.bytes_written)
    except OSError as error:
        raise write_error(error, target) from error


def protected_paths(plan: Plan) -> list[Path]:
    """What no output may replace: the sources, the recipe, its data, and where we stand."""
    adapters = [source.adapter.root for source in plan.sources if source.adapter]
    # A model's folder may have links to its weights: what they lead to must survive.
    linked = (
        source.root / name
        for source in plan.sources
        if not source.is_safetensors
        for name in source.header_bytes
    )
    return [
        *(source.root for source in plan.sources),
        *linked,
        *adapters,
        plan.recipe.folder,
        *named_files(plan.recipe),
        Path.cwd(),
    ]


def fetch_inputs(plan: Plan, on_progress: OnProgress) -> None:
    """Download the shards that the plan reads, of models that are not on this machine."""
    for i, source in enumerate(plan.sources):
        adapter = source.adapter.repository if source.adapter is not None else None
        if source.repository is None and adapter is None:
            continue
        requested = plan.shards_read(i)
        total = source.download_size(requested)
        fetched = 0

        def progress(count: int, label: str = source.label, total: int = total) -> None:
            nonlocal fetched
            fetched += count
            on_progress(Progress("fetch", fetched, total, label))

        fetch_weights(source, requested, progress)


def verified_fingerprints(plan: Plan) -> tuple[str, ...]:
    """Each source's fingerprint. A resolved recipe records them: other inputs, other bytes."""
    recorded: dict[str, str] = {}
    for made in (plan, *plan.variants.values()):
        recorded |= made.recipe.inputs
    fingerprints = []
    for i, source in enumerate(plan.sources):
        fingerprint = source.fingerprint(plan.shards_read(i))
        earlier = recorded.get(source.label, fingerprint)
        if earlier != fingerprint:
            message = f"is not the model that this recipe was resolved with ({earlier[:12]})"
            hint = "Restore it, or remove `inputs` from the recipe."
            raise SourceError(message, model=source.label, hint=hint)
        fingerprints.append(fingerprint)
    if plan.recipe.statistics_folder is not None and plan.calibrated is not None:
        for file in plan.calibrated.files:
            if not file.is_whole():
                message = "is not what was gathered: its bytes are not those that its header tells"
                raise CorruptFileError(message, file=str(file.path), hint="Restore it.")
    return tuple(fingerprints)
