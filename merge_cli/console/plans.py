"""What a plan says before it is carried out, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from merge_cli.calibration.panel import calibration_json
from merge_cli.dam.panel import training_json
from merge_cli.evolve.panel import search_json

if TYPE_CHECKING:
    from merge_cli.calibration.plan import CalibrationPlan
    from merge_cli.dam.plan import TrainingPlan
    from merge_cli.engine.options import MergeOptions
    from merge_cli.evolve.plan import SearchPlan
    from merge_cli.planning.plan import Plan


@dataclass(frozen=True)
class Before:
    """What comes before a merge, if anything does, and what that takes.

    Attributes:
        peak: of the merge's memory, in bytes.
    """

    training: TrainingPlan | None
    searching: SearchPlan | None
    gathering: CalibrationPlan | None
    peak: int


def before_merge(plan: Plan, options: MergeOptions) -> Before:
    """What is learned, searched or gathered before the merge.

    What runs models that are still to be made is checked when they are there.
    """
    from merge_cli.engine.device import choose_device
    from merge_cli.engine.memory import estimated_peak

    training = searching = gathering = None
    ready = not any(source.planned for source in plan.sources)
    if plan.learns and ready:
        from merge_cli.dam.plan import plan_training

        training = plan_training(plan, options.device)
    if plan.recipe.searches and ready:
        from merge_cli.evolve.plan import plan_search

        searching = plan_search(plan, options)
    if plan.gathers and ready:
        from merge_cli.calibration.plan import plan_calibration

        gathering = plan_calibration(plan, options.device)
    peak = estimated_peak(plan, choose_device(options.device), options)
    return Before(training, searching, gathering, peak)


def plan_document(plan: Plan, options: MergeOptions) -> dict[str, Any]:
    """The plan as data, for `--json`; under `stages` what other documents of the recipe make."""
    document = _document(plan, options)
    if plan.stages:
        document["stages"] = {name: _document(s, options) for name, s in plan.stages.items()}
    return document


def _document(plan: Plan, options: MergeOptions) -> dict[str, Any]:
    before = before_merge(plan, options)
    document = _plan_json(plan, before.peak)
    if before.training is not None:
        document["training"] = training_json(before.training)
    if before.searching is not None:
        document["search"] = search_json(before.searching)
    if before.gathering is not None:
        document["gathering"] = calibration_json(before.gathering)
    return document


def _plan_json(plan: Plan, peak: int) -> dict[str, Any]:
    """The plan as data, for `--json`. Tensors that are alike share lists: nothing may change it."""
    models = {task.sources: [plan.sources[i].label for i in task.sources] for task in plan.tasks}
    shapes = {task.shape: list(task.shape) for task in plan.tasks}
    return {
        "method": plan.recipe.merge_method,
        "base": plan.sources[plan.base].label if plan.base is not None else None,
        "sources": [plan.sources[i].label for i in plan.operands],
        "bytes_read": plan.bytes_read,
        "bytes_written": plan.bytes_written,
        "peak_memory": peak,
        "parameters": plan.parameter_count,
        "shards": [{"file": shard.file, "bytes": shard.size} for shard in plan.shards],
        "notes": list(plan.notes),
        "tensors": [
            {
                "name": task.name,
                "shape": shapes[task.shape],
                "dtype": task.dtype,
                "action": task.action,
                "from": models[task.sources],
                "parameters": task.parameters,
                "note": task.note,
            }
            for task in plan.tasks
        ],
    }
