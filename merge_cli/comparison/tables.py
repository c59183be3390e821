"""The comparison as one table: Markdown for a README, CSV for another program."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from merge_cli.report.numbers import number
from merge_cli.system.machine import show_seconds, show_size

Json = Mapping[str, Any]
_COSTS = (
    "seconds",
    "tokens",
    "forward_passes",
    "backward_passes",
    "peak_rss",
    "peak_vram",
    "joules",
)


def columns(record: Json) -> list[str]:
    """Heads of the table."""
    tasks = [f"{task['name']} {_arrow(task['better'])}" for task in record["tasks"]]
    means = []
    if record["models"][0]["mean"] is not None:
        means.append(f"mean {_arrow(record['tasks'][0]['better'])}")
    if record["models"][0]["normalised_mean"] is not None:
        means.append("normalised ↑")
    gain = [f"better than {record['reference']}"] if record["reference"] else []
    return ["model", *tasks, *means, *gain, "time", "tokens", "peak memory", "energy"]


def rows(record: Json) -> list[list[str]]:
    """Cells under `columns`, one row for each model."""
    return [_row(record, model) for model in record["models"]]


def used_columns(record: Json) -> tuple[list[str], list[list[str]]]:
    """Heads and rows, without tokens or energy where no model has any, and a mean of one task."""
    heads, body = columns(record), rows(record)
    tasks = len(record["tasks"])
    columns_used = [
        i
        for i, head in enumerate(heads)
        if (head not in ("tokens", "energy") or any(row[i] not in ("–", "0") for row in body))
        and not (tasks == 1 and i == tasks + 1 and head.startswith("mean "))
    ]
    return [heads[i] for i in columns_used], [[row[i] for i in columns_used] for row in body]


def markdown(record: Json) -> str:
    """The table, what its columns mean, and the notes."""
    heads, body = used_columns(record)
    lines = [
        f"| {' | '.join(heads)} |",
        f"|{'|'.join(['---', *['---:'] * (len(heads) - 1)])}|",
        *(f"| {' | '.join(_bold(record, row))} |" for row in body),
        "",
        *([f"**{record['verdict']['text']}**", ""] if record["verdict"] else []),
        *(f"- {line}" for line in legend(record)),
        *(f"- {note}" for note in record["notes"]),
        "",
    ]
    return "\n".join(lines)


def legend(record: Json) -> list[str]:
    """What the columns mean, a line each."""
    units: dict[str, list[str]] = {}
    for task in record["tasks"]:
        units.setdefault(f"{task['metric']}, {task['unit']}", []).append(task["name"])
    lines = [f"{', '.join(names)}: {unit}" for unit, names in units.items()]
    shared = [task for task in record["tasks"] if task["normalised"]]
    if shared:
        experts = ", ".join(f"{task['name']} ({task['expert']})" for task in shared)
        lines.append(
            f"normalised: 0 is the base, 1 the domain's own expert; mean over {experts}, "
            "with its 95 % interval"
        )
    if record["reference"]:
        by = record["ranking"]["by"]
        lines.append(
            f"better than {record['reference']}: difference in the {by}, with its paired 95 % "
            "interval; * where the interval excludes 0"
        )
    lines.append("time: wall time of the merge's command, its process's start included")
    return lines


def csv_text(record: Json) -> str:
    """One row for each model and task, and one for each mean, with unrounded numbers."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        [
            "model",
            "role",
            "method",
            "task",
            "metric",
            "unit",
            "value",
            "low",
            "high",
            "normalised",
            "normalised_low",
            "normalised_high",
            *_COSTS,
        ]
    )
    for model in record["models"]:
        cost = model["cost"] or {}
        costs = [cost.get(key, "") for key in _COSTS]
        start = [model["name"], model["role"], model["method"]]
        for task in record["tasks"]:
            name = task["name"]
            writer.writerow(
                [
                    *start,
                    name,
                    task["metric"],
                    task["unit"],
                    *_numbers(model["scores"][name]),
                    *_numbers(model["normalised"].get(name)),
                    *costs,
                ]
            )
        if model["mean"] or model["normalised_mean"]:
            writer.writerow(
                [
                    *start,
                    "mean",
                    "",
                    "",
                    *_numbers(model["mean"]),
                    *_numbers(model["normalised_mean"]),
                    *costs,
                ]
            )
    return out.getvalue()


def decimals(value: float, sign: str = "", digits: int = 3) -> str:
    """A fixed number of decimals, so that values in a column line up."""
    return number(value, f"{sign}.{digits}f")


def with_interval(score: Json | None, sign: str = "") -> str:
    """A value with its interval: 0.052 (0.037 to 0.067)."""
    if score is None:
        return "–"
    text = decimals(score["value"], sign)
    if score["interval"] is None:
        return text
    low, high = (decimals(end, sign) for end in score["interval"])
    return f"{text} ({low} to {high})"


def excludes_zero(score: Json | None) -> bool:
    """Whether a difference's interval excludes 0."""
    ends = score["interval"] if score is not None else None
    return ends is not None and bool(ends[0] > 0 or ends[1] < 0)


def _row(record: Json, model: Json) -> list[str]:
    cells = [model["name"]]
    cells += [decimals(model["scores"][task["name"]]["value"]) for task in record["tasks"]]
    if model["mean"] is not None:
        cells.append(decimals(model["mean"]["value"]))
    if model["normalised_mean"] is not None:
        cells.append(with_interval(model["normalised_mean"]))
    if record["reference"]:
        gain = model["gain"]
        cells.append(with_interval(gain, "+") + (" *" if excludes_zero(gain) else ""))
    cost = model["cost"]
    if cost is None:
        return [*cells, "–", "–", "–", "–"]
    memory = show_size(cost["peak_rss"])
    if cost["peak_vram"]:
        memory += f" + {show_size(cost['peak_vram'])} GPU"
    joules = "–" if cost["joules"] is None else f"{cost['joules']:.3g} J"
    return [*cells, show_seconds(cost["seconds"]), f"{cost['tokens']:,}", memory, joules]


def _bold(record: Json, row: Sequence[str]) -> list[str]:
    return [f"**{row[0]}**" if row[0] in record["front"] else row[0], *row[1:]]


def _numbers(score: Json | None) -> list[object]:
    if score is None:
        return ["", "", ""]
    return [score["value"], *(score["interval"] or ["", ""])]


def _arrow(better: str) -> str:
    return "↓" if better == "lower" else "↑"
