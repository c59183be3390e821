"""What a plan says before it is carried out, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from merge_cli.planning.preparation import Preparation, preparations_of

if TYPE_CHECKING:
    from merge_cli.options import MergeOptions
    from merge_cli.planning.plan import Plan


@dataclass(frozen=True)
class Forecast:
    """What comes before a merge, if anything does, and what the merge takes.

    Attributes:
        preparations: each with what it has decided.
        peak: of the merge's memory, in bytes.
    """

    preparations: tuple[tuple[Preparation, Any], ...]
    peak: int


def forecast(plan: Plan, options: MergeOptions) -> Forecast:
    """Plan what comes before the merge, and estimate the merge's memory.

    What runs models that are still to be made is left out: it is planned when they are there.
    """
    from merge_cli.engine.device import choose_device
    from merge_cli.engine.memory import estimated_peak

    decided = [(item, item.plan(plan, options)) for item in preparations_of(plan)]
    device = options.device if options.ray is None else "cpu"  # nodes are not looked at here
    peak = estimated_peak(plan, choose_device(device, planned=True), options)
    return Forecast(tuple(pair for pair in decided if pair[1] is not None), peak)


def plan_document(plan: Plan, options: MergeOptions) -> dict[str, Any]:
    """The plan as data, for `--json`; under `stages` what other documents of the recipe make."""
    document = _document(plan, options)
    if plan.variants:
        document["sweep"] = {name: _document(v, options) for name, v in plan.variants.items()}
    if plan.stages:
        document["stages"] = {name: _document(s, options) for name, s in plan.stages.items()}
    return document


def _document(plan: Plan, options: MergeOptions) -> dict[str, Any]:
    expected = forecast(plan, options)
    document = _plan_json(plan, expected.peak)
    for preparation, decided in expected.preparations:
        document[preparation.section] = preparation.plan_json(decided)
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
        "downloads": {
            label: {"files": files, "bytes": size}
            for label, (files, size) in plan.downloads.items()
        },
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
