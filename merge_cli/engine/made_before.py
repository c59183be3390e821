"""OUT, if it is already the result of this very merge: then nothing is done again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from merge_cli.engine.device import device_of
from merge_cli.engine.journal import work_key
from merge_cli.options import MergeOptions
from merge_cli.planning.plan import Plan
from merge_cli.planning.preparation import preparations_of

REPORT = "merge_report.json"


def read_report(out: Path) -> dict[str, Any]:
    """The report in a published folder."""
    report: dict[str, Any] = json.loads((out / REPORT).read_text(encoding="utf-8"))
    return report


def request_key(plan: Plan, options: MergeOptions) -> str:
    """What was asked for, of a merge that learns, searches or gathers first; empty for others.

    The report's `work` is about what came of that: the resolved recipe. This is a fingerprint of
    the recipe as it was given, its models, and all data that it goes by.
    """
    if not preparations_of(plan):
        return ""
    return work_key(plan, device_of(options).kind, options.statistics, options.accept_best)


def made_before(plan: Plan, out: Path, options: MergeOptions) -> dict[str, Any] | None:
    """OUT's report, if OUT is already what this plan makes; None for anything else."""
    try:
        report = read_report(out)
    except (OSError, ValueError):
        return None
    if not isinstance(report, dict):
        return None
    if request := request_key(plan, options):
        return report if report.get("request") == request else None
    key = work_key(plan, device_of(options).kind, options.statistics)
    return report if report.get("work") == key else None
