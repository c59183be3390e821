"""comparison.json: everything that the table and the page show (docs/compare.md).

The page, the table and the terminal are drawn from this record alone.

Writes a comparison into its folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from merge_cli.comparison.page import render_comparison
from merge_cli.comparison.result import Comparison, ModelEntry, ModelScore
from merge_cli.comparison.tables import csv_text, markdown
from merge_cli.evaluation.run import write_examples
from merge_cli.system.raw_io import write_error

SCHEMA = 1


def comparison_record(found: Comparison) -> dict[str, Any]:
    """A comparison as JSON-ready data."""
    first = found.entrants[0].evaluation
    return {
        "schema": SCHEMA,
        "merge_cli": version("merge-cli"),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": first.device,
        "dtype": first.dtype,
        "tasks": [
            {
                "name": name,
                "kind": task.kind,
                "metric": task.primary.name,
                "unit": task.primary.unit,
                "better": task.primary.better,
                "examples": len(task.primary.parts),
                "expert": found.experts.get(name),
                "normalised": name in found.shared,
            }
            for name, task in first.tasks.items()
        ],
        "ranking": {
            "by": "normalised mean" if found.quality else "mean" if found.averages else "task",
            "better": found.ranking_better,
        },
        "reference": found.reference.name if found.reference else None,
        "front": list(found.front),
        "same": dict(found.same),
        "notes": list(found.notes),
        "models": [_model(found, entrant) for entrant in found.entrants],
    }


def _model(found: Comparison, one: ModelEntry) -> dict[str, Any]:
    name = one.name
    return {
        "name": name,
        "role": one.role,
        "method": one.method,
        "place": one.place,
        "digest": one.evaluation.digest,
        "scores": {task: _score(found.scores[name, task]) for task in found.tasks},
        "normalised": {task: _score(found.normalised[name, task]) for task in found.shared},
        "mean": _score(found.averages.get(name)),
        "normalised_mean": _score(found.quality.get(name)),
        "gain": _score(found.gain(name)),
        "metrics": {
            task.name: {metric.name: metric.value for metric in task.metrics.values()}
            for task in one.evaluation.tasks.values()
        },
        "cost": asdict(one.cost) if one.cost else None,
        "evaluation_cost": asdict(one.evaluation.cost),
        "recipe": one.recipe,
    }


def _score(score: ModelScore | None) -> Mapping[str, Any] | None:
    if score is None:
        return None
    ends = score.interval
    return {"value": score.value, "interval": [ends.low, ends.high] if ends else None}


def write_comparison(found: Comparison, folder: Path) -> dict[str, Any]:
    """comparison.json, .md, .csv and .html, and examples.jsonl.

    Returns:
        the record.

    Raises:
        ResourceError: the folder cannot be written.
    """
    record = comparison_record(found)
    files = {
        "comparison.json": json.dumps(record, indent=1, ensure_ascii=False) + "\n",
        "comparison.md": markdown(record),
        "comparison.csv": csv_text(record),
        "comparison.html": render_comparison(record),
    }
    try:
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
        named = [(entrant.name, entrant.evaluation) for entrant in found.entrants]
        write_examples(named, folder / "examples.jsonl")
    except OSError as error:
        raise write_error(error, folder) from error
    return record
