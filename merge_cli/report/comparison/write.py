"""Writes a comparison into its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from merge_cli.checkpoint.raw import write_error
from merge_cli.comparison.result import Comparison
from merge_cli.evaluation.run import write_examples
from merge_cli.report.comparison.page import render_comparison
from merge_cli.report.comparison.record import comparison_record
from merge_cli.report.comparison.table import csv_text, markdown


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
        named = [(one.name, one.evaluation) for one in found.entrants]
        write_examples(named, folder / "examples.jsonl")
    except OSError as error:
        raise write_error(error, folder) from error
    return record
