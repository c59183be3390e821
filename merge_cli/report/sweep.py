"""The reports of a sweep: every variant's own, and one line on each beside them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from merge_cli.engine.merge_stats import MergeStats, TensorStats
from merge_cli.planning.plan import Plan, TensorTask
from merge_cli.planning.sweep import operand_key
from merge_cli.report.write import SCHEMA, write_reports
from merge_cli.system.raw_io import replace_file


def write_sweep(
    plan: Plan,
    fingerprints: Sequence[str],
    outcome: MergeStats,
    folder: Path,
    target: Path,
    *,
    card: bool = True,
) -> dict[str, Any]:
    """The reports of every variant in its folder, and merge_report.json of all in this one.

    Args:
        folder: where the variants' folders are.
        target: where it will be published.

    Returns:
        merge_report.json, with the variants' reports under `sweep`.
    """
    of_root = {s.root: f for s, f in zip(plan.sources, fingerprints, strict=True)}
    reports = {}
    for name, variant in plan.variants.items():
        source_reports = tuple(of_root[source.root] for source in variant.sources)
        stats = [
            _its_own(task, joint, sums)
            for task, joint, sums in zip(variant.tasks, plan.tasks, outcome.stats, strict=True)
        ]
        of_variant = replace(outcome, stats=stats)
        out = target / name
        reports[name] = write_reports(
            variant, source_reports, of_variant, folder / name, out, card=card
        )
    any_report = next(iter(reports.values()))
    report = {
        "schema": SCHEMA,
        "work": outcome.key,
        "merge_cli": version("merge-cli"),
        "created": any_report["created"],
        "sweep": [*reports],
        "cost": {
            **any_report["cost"],
            "bytes_read": plan.bytes_read,
            "bytes_written": plan.bytes_written,
        },
    }
    text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
    replace_file(folder / "merge_report.json", text.encode())
    return {**report, "sweep": reports}


def _its_own(task: TensorTask, joint: TensorTask, sums: TensorStats) -> TensorStats:
    """What was counted of a variant's operands."""
    if not sums.non_finite:
        return TensorStats()
    counts = dict(zip(map(operand_key, joint.operands), sums.non_finite, strict=True))
    return TensorStats(non_finite=[counts[operand_key(operand)] for operand in task.operands])
