"""The report page's section on an automatic merge: the path, and whether it was worth it.

Its data is in merge_report.json under `auto` (docs/auto.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from merge_cli.report import charts
from merge_cli.report.page import Section, Table, duration, figure, section, strong

Json = Mapping[str, Any]


def automatic_sections(report: Json) -> list[Section]:
    """The section of a report of an automatic merge; none for other methods."""
    auto = report.get("auto")
    return [_path(auto), _verdict(auto)] if auto else []


def _path(auto: Json) -> Section:
    how = (
        "Every merge that was tried, in order, with its mean loss over the data sets on validation "
        "rows, nats per token; lower is better. A step is kept if it is better than all before."
    )
    path = auto["path"]
    rows = [
        [
            strong(line["step"]) if line["step"] == auto["best"] else line["step"],
            "–" if line["loss"] is None else f"{line['loss']:.4f}",
            duration(line["seconds"]) if line["seconds"] else "–",
            f"{line['tokens']:,}",
            "yes" if line["kept"] else line["note"] or "no",
        ]
        for line in path
    ]
    measured = [line for line in path if line["loss"] is not None]
    worst = max(line["loss"] for line in measured)
    bars = [
        (charts.shorten(line["step"], 44), worst - line["loss"], f"{line['loss']:.4f}")
        for line in measured
    ]
    chart = charts.side_bars("Gain over the worst step", bars)
    cost = auto["cost"]
    summary = (
        f"{len(path)} steps in {duration(cost['seconds'])}, {cost['tokens']:,} tokens: "
        f"{auto['ended']}."
    )
    table = Table(["step", "validation loss", "time", "tokens", "kept"], rows, right=4)
    caption = "How much lower each step's loss is than the worst; the numbers are the losses."
    return section("The path", how, summary, figure(caption, chart), table)


def _verdict(auto: Json) -> Section:
    how = (
        "Losses on test rows, which nothing was trained on or chosen by. Intervals are of the "
        "paired bootstrap over rows."
    )
    verdict = auto["verdict"]
    names = list(next(iter(verdict["losses"].values())))
    rows = []
    for name, losses in verdict["losses"].items():
        found = verdict["gain"].get(name)
        text = f"{found['value']:.4f} ({found['low']:.4f} to {found['high']:.4f})" if found else "–"
        rows.append(
            [name, *(f"{losses[n]:.4f}" for n in names), f"{verdict['loss'][name]:.4f}", text]
        )
    heads = ["merge", *names, "mean", "gain of the result"]
    table = Table(heads, rows, right=len(heads) - 1)
    return section("Whether it was worth it", how, auto["sentence"], table)
