"""Learned coefficients in the report: how much of each source every layer took."""

from __future__ import annotations

import math
from typing import Any

from merge_cli.engine.layers import layer_key_of
from merge_cli.engine.plan import Plan
from merge_cli.recipe.reference import short_labels


def coefficient_summary(plan: Plan) -> dict[str, Any]:
    """Mean coefficients by group of tensors and source, weighted by elements."""
    file = plan.coefficients
    assert file is not None, "only a merge with coefficients has a summary of them"
    groups: dict[str, list[float]] = {}
    sizes: dict[str, int] = {}
    for task in plan.tasks:
        if task.action != "merge":
            continue
        own = file.of(task.name, task.shape)
        size = math.prod(task.shape)
        total = groups.setdefault(task.group, [0.0] * len(task.operands))
        sizes[task.group] = sizes.get(task.group, 0) + size
        for i in range(len(task.operands)):
            total[i] += own.mean(i) * size
    return {
        "form": file.form,
        "digest": file.digest,
        "models": short_labels([plan.sources[i].label for i in plan.operands]),
        "groups": [
            {
                "name": name,
                "layer": place.index if (place := layer_key_of(f"{name}.x")) else None,
                "count": sizes[name],
                "mean": [_rounded(value / sizes[name]) for value in total] if sizes[name] else [],
            }
            for name, total in groups.items()
        ],
    }


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
