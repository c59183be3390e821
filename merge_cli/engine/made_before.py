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


def made_before(plan: Plan, out: Path, options: MergeOptions) -> dict[str, Any] | None:
    """OUT's report, if OUT is already what this plan makes; None for anything else.

    Of a method that learns or searches this is never known: what OUT was found by is not in it.
    """
    try:
        report = read_report(out)
    except (OSError, ValueError):
        return None
    if not isinstance(report, dict):
        return None
    for preparation in preparations_of(plan):
        remembered = preparation.remembered(plan, options)
        if remembered is None:
            return None
        plan = remembered
    key = work_key(plan, device_of(options).kind, options.statistics)
    return report if report.get("work") == key else None
