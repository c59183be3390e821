"""From a plan that lacks statistics to one that has them: each source's model, one at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from merge_cli.calibration.fisher import gather_importances
from merge_cli.calibration.gram import gather_grams
from merge_cli.calibration.plan import ORIGIN, CalibrationPlan, SourcePart, plan_calibration
from merge_cli.calibration.store import Writer, find, making
from merge_cli.checkpoint.statistics import CalibrationStatistics, StatisticsFile
from merge_cli.dam.plan import fetch_everything
from merge_cli.engine.memory import return_freed_memory
from merge_cli.engine.options import MergeOptions, OnProgress, Progress
from merge_cli.errors import Interrupted
from merge_cli.evaluation.fingerprints import refuse_changed, source_identity
from merge_cli.evaluation.live import load, memory_errors
from merge_cli.planning.plan import Plan
from merge_cli.recipe.training import Statistics
from merge_cli.system.machine import torch_threads

_GATHERERS = {"gram": gather_grams, "fisher": gather_importances}
_SMALLER = "Try a smaller max_length, or dtype: bfloat16, under `statistics:`."


def calibrate(
    plan: Plan, options: MergeOptions, show: OnProgress, begin: Callable[[], None] = lambda: None
) -> Plan:
    """Gather what the cache does not have yet.

    A source's file is written when the source is done: after an interruption, the same command
    continues with the next one.

    Args:
        begin: called before the first model is run, if one must be.

    Raises:
        SourceError, MismatchError, RecipeError: see `plan_gathering`.
        ResourceError: memory or disk ran out.
        NonFiniteError: a gradient is not a number.
        Interrupted: Ctrl-C or SIGTERM.
    """
    decided = plan_calibration(plan, options.device, source_identity)
    there = [find(part.place, read=True) for part in decided.parts]
    if None in there:
        begin()
        fetch_everything(plan)
        return_freed_memory()
    files = []
    try:
        for part, known in zip(decided.parts, there, strict=True):
            files.append(known or _gather_one(part, options, show))
    except KeyboardInterrupt:
        done = len(files)
        message = f"stopped while statistics were gathered: {done} of {len(decided.parts)} are done"
        raise Interrupted(message, hint="The same command continues.") from None
    return with_statistics(decided, CalibrationStatistics(tuple(files)))


def known(plan: Plan, device: str) -> Plan | None:
    """The plan with its statistics, if the cache has them all."""
    if any(source.planned for source in plan.sources):
        return None
    decided = plan_calibration(plan, device, source_identity)
    return None if decided.gathered is None else with_statistics(decided, decided.gathered)


def with_statistics(decided: CalibrationPlan, gathered: CalibrationStatistics) -> Plan:
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
        for part, file in zip(decided.parts, gathered.files, strict=True)
    ]
    recipe = replace(
        plan.recipe,
        statistics=plan.recipe.statistics or Statistics(),
        metadata={**plan.recipe.metadata, ORIGIN: origin},
    )
    return replace(plan, recipe=recipe, gathered=gathered)


def _gather_one(part: SourcePart, options: MergeOptions, show: OnProgress) -> StatisticsFile:
    """Run one source's model over its examples, and keep what is found."""
    label = part.source.label

    def tell(done: int, total: int) -> None:
        show(Progress("gather", done, total, label, "tokens"))

    def waiting() -> None:
        show(Progress("gather", 0, 0, f"waiting for another process to gather from {label}"))

    with making(part.place, waiting) as path:
        if path is None:
            result = find(part.place)
            assert result is not None, "making has just seen it"
            return result
        with torch_threads(options.threads), memory_errors(label, _SMALLER):
            return replace(_made(part, path, tell), cached=False)


def _made(part: SourcePart, path: Path, tell: Callable[[int, int], None]) -> StatisticsFile:
    writers: list[Writer] = []

    def writer(*about: Any) -> Writer:
        writers.append(Writer(path, part.kind, *about))
        return writers[0]

    live = load(part.source, device=part.device, dtype=part.dtype)
    assert part.identity is not None, "it was read before it was run"
    refuse_changed(part.source, part.identity)
    part.about.update(examples=len(part.examples.items), tokens=part.examples.tokens)
    try:
        file = _GATHERERS[part.kind](live, part, writer, tell)
        return file.finish(part.place, part.about)
    finally:
        live.close()
        for item in writers:
            item.close()
