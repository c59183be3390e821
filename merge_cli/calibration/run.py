"""From a plan that lacks statistics to one that has them: each source's model, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from merge_cli.calibration.data import Examples
from merge_cli.calibration.fisher import gather_importances
from merge_cli.calibration.gram import gather_grams
from merge_cli.calibration.plan import CalibrationPlan, SourcePart, plan_calibration
from merge_cli.calibration.store import Writer, find, making
from merge_cli.checkpoint.statistics import CalibrationStatistics, StatisticsFile
from merge_cli.engine.memory import return_freed_memory
from merge_cli.errors import Interrupted
from merge_cli.evaluation.fingerprints import refuse_changed, source_identity
from merge_cli.evaluation.guards import memory_errors
from merge_cli.evaluation.live import fetch_everything, load
from merge_cli.options import MergeOptions, OnProgress, Progress
from merge_cli.planning.plan import Plan
from merge_cli.recipe.statistics import ORIGIN, Statistics, statistics_file
from merge_cli.system.machine import torch_threads
from merge_cli.system.raw_io import write_error

_MEASURES = {"gram": gather_grams, "fisher": gather_importances}
_SMALLER = "Try a smaller max_length, or dtype: bfloat16, under `statistics:`."


def calibrate(
    plan: Plan,
    options: MergeOptions,
    on_progress: OnProgress,
    begin: Callable[[], None] = lambda: None,
    examples: Sequence[Examples] | None = None,
) -> Plan:
    """Measure what the cache does not have yet.

    A source's file is written when the source is done: after an interruption, the same command
    continues with the next one.

    Args:
        begin: called before the first model is run, if one must be.
        examples: as for `plan_calibration`.

    Raises:
        SourceError, MismatchError, RecipeError: see `plan_calibration`.
        ResourceError: memory or disk ran out.
        NonFiniteError: a gradient is not a number.
        Interrupted: Ctrl-C or SIGTERM.
    """
    decided = plan_calibration(plan, options.device, source_identity, examples)
    cached = [find(part.path, read=True) for part in decided.parts]
    if None in cached:
        begin()
        fetch_everything(plan)
        return_freed_memory()
    files = []
    try:
        for part, file in zip(decided.parts, cached, strict=True):
            files.append(file or _measure_one(part, options, on_progress))
    except KeyboardInterrupt:
        done = len(files)
        message = f"stopped while statistics were gathered: {done} of {len(decided.parts)} are done"
        raise Interrupted(message, hint="The same command continues.") from None
    return with_statistics(decided, CalibrationStatistics(tuple(files)))


def with_statistics(decided: CalibrationPlan, calibrated: CalibrationStatistics) -> Plan:
    """The plan with what was gathered, and a recipe that says of what."""
    plan = decided.plan
    origin = [
        {
            "model": Path(part.source.label).name,
            "examples": len(part.examples.items),
            "tokens": part.examples.tokens,
            "data": part.examples.digest,
            "statistics": file.digest,
        }
        for part, file in zip(decided.parts, calibrated.files, strict=True)
    ]
    recipe = replace(
        plan.recipe,
        statistics=plan.recipe.statistics or Statistics(),
        metadata={**plan.recipe.metadata, ORIGIN: origin},
    )
    return replace(plan, recipe=recipe, calibrated=calibrated)


def with_folder(plan: Plan, folder: Path) -> Plan:
    """The plan, whose recipe names a folder of its statistics instead of data.

    Args:
        folder: it gets links to the cache, whose files are copied when OUT is made.

    Raises:
        ResourceError: the folder cannot be written.
    """
    assert plan.calibrated is not None, "it has been calibrated"
    try:
        folder.mkdir(exist_ok=True)
        for number, file in enumerate(plan.calibrated.files):
            link = folder / statistics_file(number)
            link.unlink(missing_ok=True)  # of a run that was stopped
            link.symlink_to(file.path.absolute())
    except OSError as error:
        raise write_error(error, folder) from error
    models = tuple(replace(spec, data=None) for spec in plan.recipe.models)
    recipe = replace(
        plan.recipe, models=models, statistics=None, statistics_folder=str(folder.absolute())
    )
    return replace(plan, recipe=recipe)


def _measure_one(
    part: SourcePart, options: MergeOptions, on_progress: OnProgress
) -> StatisticsFile:
    """Run one source's model over its examples, and keep the statistics."""
    label = part.source.label

    def on_tokens(done: int, total: int) -> None:
        on_progress(Progress("gather", done, total, label, "tokens"))

    def waiting() -> None:
        on_progress(Progress("gather", 0, 0, f"waiting for another process to gather from {label}"))

    with making(part.path, waiting) as path:
        if path is None:
            result = find(part.path)
            assert result is not None, "making has just seen it"
            return result
        on_progress(Progress("gather", 0, 0, f"{label} is loaded, to look at its examples"))
        with torch_threads(options.threads), memory_errors(label, _SMALLER):
            return replace(_measured(part, path, on_tokens), cached=False)


def _measured(
    part: SourcePart, path: Path, on_tokens: Callable[[int, int], None]
) -> StatisticsFile:
    writers: list[Writer] = []

    def writer(*about: Any) -> Writer:
        writers.append(Writer(path, part.kind, *about))
        return writers[0]

    live = load(part.source, device=part.device, dtype=part.dtype)
    assert part.identity is not None, "it was read before it was run"
    refuse_changed(part.source, part.identity)
    part.about.update(examples=len(part.examples.items), tokens=part.examples.tokens)
    try:
        file = _MEASURES[part.kind](live, part, writer, on_tokens)
        return file.finish(part.path, part.about)
    finally:
        live.close()
        for item in writers:
            item.close()
