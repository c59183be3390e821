"""The report page's section on an automatic merge: the path, and whether it was worth it.

Its data is in merge_report.json under `auto` (docs/auto.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from merge_cli.auto.checks import SOUP
from merge_cli.report.numbers import duration
from merge_cli.report.page import Figure, Section, Table, figure, section, strong
from merge_cli.report.plots import Point, plane

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
    cost = auto["cost"]
    summary = (
        f"{len(path)} steps in {duration(cost['seconds'])}, {cost['tokens']:,} tokens: "
        f"{auto['ended']}."
    )
    if finalists := [line for line in path if "final_loss" in line]:
        losses = [f"{line['step']} {line['final_loss']:.4f}" for line in finalists]
        summary += f" The best few on all validation rows: {', '.join(losses)}."
    table = Table(["step", "validation loss", "time", "tokens", "kept"], rows, right=4)
    return section("The path", how, summary, *_gains(auto), table)


def _gains(auto: Json) -> list[Figure]:
    """Quality against cost: what each method has brought by the time that it was done."""
    gains, points = auto["verdict"]["gain_over_soup"], []
    for line in auto["path"]:
        gain = gains.get(line["step"])
        if gain is None:
            continue
        ends = (gain["low"], gain["high"])
        style = "s-0" if line["kept"] else "s-base"
        points.append(
            Point(line["step"], max(line["clock"], 0.01), gain["value"], ends, style, line["kept"])
        )
    if len(points) < 2:
        return []
    chart = plane(
        "Quality against cost",
        points,
        "time from the first step on (logarithmic)",
        "gain over the uniform soup on test rows, nats per token",
        lambda value: f"{value:.3f}",
        duration,
        lower_is_better=False,
        levels=[(SOUP, 0.0)],
    )
    caption = (
        "How much lower the loss on test rows is than the uniform soup's; up is better. Lines "
        "through points are 95 % intervals. The dashed line joins the steps that were kept."
    )
    return [figure(caption, chart)]


def _verdict(auto: Json) -> Section:
    how = (
        "Losses on test rows, which nothing was trained on or chosen by. Intervals are of the "
        "paired bootstrap over rows."
    )
    verdict = auto["verdict"]
    names = list(next(iter(verdict["losses"].values())))
    rows = []
    for name, losses in verdict["losses"].items():
        gain = verdict["gain_over_soup"].get(name)
        text = f"{gain['value']:.4f} ({gain['low']:.4f} to {gain['high']:.4f})" if gain else "–"
        rows.append(
            [name, *(f"{losses[n]:.4f}" for n in names), f"{verdict['loss'][name]:.4f}", text]
        )
    heads = ["merge", *names, "mean", f"better than {SOUP}"]
    table = Table(heads, rows, right=len(heads) - 1)
    return section("Whether it was worth it", how, auto["sentence"], table)
