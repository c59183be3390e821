"""Writing a comparison's folder: comparison.json (docs/compare.md), tables, page, examples.

Tables, page and terminal output are made only from the record in comparison.json.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from merge_cli.comparison.cost import COSTS
from merge_cli.comparison.entries import SOUP, TASK_ARITHMETIC
from merge_cli.comparison.page import render_comparison
from merge_cli.comparison.result import Comparison, ModelEntry, ModelScore
from merge_cli.comparison.tables import csv_text, markdown
from merge_cli.comparison.verdict import verdict
from merge_cli.evaluation.run import write_examples
from merge_cli.system.raw_io import write_error

SCHEMA = 1
_RECORD, _MARKDOWN, _CSV, _PAGE = (f"comparison.{end}" for end in ("json", "md", "csv", "html"))
_EXAMPLES = "examples.jsonl"


def slug(name: str) -> str:
    """A name as part of a file's."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-")


def recipe_file(folder: Path, baseline: str) -> Path:
    """The file of a baseline's recipe."""
    return folder / "recipes" / f"{slug(baseline)}.yaml"


def result_files(folder: Path) -> dict[str, Path]:
    """Every file that a comparison writes into its folder, by the option that says so."""
    files = [folder / name for name in (COSTS, _RECORD, _MARKDOWN, _CSV, _PAGE, _EXAMPLES)]
    files += [recipe_file(folder, name) for name in (SOUP, TASK_ARITHMETIC)]
    return {f"--out ({file.relative_to(folder)})": file for file in files}


def comparison_record(comparison: Comparison) -> dict[str, Any]:
    """A comparison as JSON-ready data."""
    evaluation = comparison.entries[0].evaluation
    conclusion = verdict(comparison)
    return {
        "schema": SCHEMA,
        "merge_cli": version("merge-cli"),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": evaluation.device,
        "dtype": evaluation.dtype,
        "tasks": [
            {
                "name": name,
                "kind": task.kind,
                "metric": task.primary.name,
                "unit": task.primary.unit,
                "better": task.primary.better,
                "examples": len(task.primary.parts),
                "expert": comparison.experts.get(name),
                "normalised": name in comparison.shared,
            }
            for name, task in evaluation.tasks.items()
        ],
        "ranking": {
            "by": "normalised mean"
            if comparison.quality
            else "mean"
            if comparison.averages
            else "task",
            "better": comparison.ranking_better,
        },
        "reference": comparison.reference.name if comparison.reference else None,
        "verdict": asdict(conclusion) if conclusion else None,
        "front": list(comparison.front),
        "same": dict(comparison.same),
        "notes": list(comparison.notes),
        "models": [_model(comparison, entry) for entry in comparison.entries],
    }


def _model(comparison: Comparison, entry: ModelEntry) -> dict[str, Any]:
    name = entry.name
    return {
        "name": name,
        "role": entry.role,
        "method": entry.method,
        "place": entry.location,
        "digest": entry.evaluation.digest,
        "scores": {task: _score(comparison.scores[name, task]) for task in comparison.tasks},
        "normalised": {
            task: _score(comparison.normalised[name, task]) for task in comparison.shared
        },
        "mean": _score(comparison.averages.get(name)),
        "normalised_mean": _score(comparison.quality.get(name)),
        "gain": _score(comparison.gain(name)),
        "metrics": {
            task.name: {metric.name: metric.value for metric in task.metrics.values()}
            for task in entry.evaluation.tasks.values()
        },
        "cost": asdict(entry.cost) if entry.cost else None,
        "evaluation_cost": asdict(entry.evaluation.cost),
        "recipe": entry.recipe,
    }


def _score(score: ModelScore | None) -> Mapping[str, Any] | None:
    if score is None:
        return None
    interval = score.interval
    return {"value": score.value, "interval": [interval.low, interval.high] if interval else None}


def write_comparison(comparison: Comparison, folder: Path) -> dict[str, Any]:
    """Write comparison.json, .md, .csv and .html, and examples.jsonl.

    Returns:
        the record.

    Raises:
        ResourceError: the folder cannot be written.
    """
    record = comparison_record(comparison)
    files = {
        _RECORD: json.dumps(record, indent=1, ensure_ascii=False) + "\n",
        _MARKDOWN: markdown(record),
        _CSV: csv_text(record),
        _PAGE: render_comparison(record),
    }
    try:
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
        evaluations = [(entry.name, entry.evaluation) for entry in comparison.entries]
        write_examples(evaluations, folder / _EXAMPLES)
    except OSError as error:
        raise write_error(error, folder) from error
    return record
