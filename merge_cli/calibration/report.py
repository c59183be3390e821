"""merge_report.json on what was gathered: for each source of what, and how much of it counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from merge_cli.checkpoint.statistics import CalibrationStatistics, StatisticsFile
from merge_cli.planning.plan import Plan


def calibration_summary(plan: Plan, calibrated: CalibrationStatistics) -> dict[str, Any]:
    """Sources, and how many merged tensors had no statistics and are a plain mean."""
    merged = [task for task in plan.tasks if task.action == "merge"]
    means = sum(map(plan.is_plain_mean, merged))
    sources = [
        {"model": str(spec.model), **_of_file(file)}
        for spec, file in zip(plan.recipe.models, calibrated.files, strict=True)
    ]
    return {
        "kind": plan.method.gathers,
        "tensors": len(merged),
        "means": means,
        "sources": sources,
        "cost": _cost(calibrated.files),
    }


def _cost(files: Sequence[StatisticsFile]) -> dict[str, int]:
    """What gathering takes, or took when it was done; of one round."""
    passes = sum(file.about["passes"] for file in files)
    backward = sum(file.about["passes"] for file in files if file.kind == "fisher")
    tokens = sum(file.about["tokens"] for file in files)
    return {"tokens": tokens, "forward_passes": passes, "backward_passes": backward}


def _of_file(file: StatisticsFile) -> dict[str, Any]:
    about = file.about
    result = {
        "examples": about["examples"],
        "tokens": about["tokens"],
        "bytes": file.size,
        "digest": file.digest,
        "from_cache": file.cached,
    }
    if file.kind == "fisher":
        share = about["zero"] / about["elements"] if about["elements"] else 0.0
        result["zero"] = float(f"{share:.4g}")
    return result
