"""comparison.html: tables and plots of every model's quality and cost.

The plots show scores with their intervals, and quality against cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from merge_cli.comparison.tables import (
    decimals,
    excludes_zero,
    legend,
    number,
    used_columns,
    with_interval,
)
from merge_cli.report import charts
from merge_cli.report.charts import Format, Scale, caption, svg, text_width, tick_step, titled
from merge_cli.report.page import (
    Details,
    KeyFigure,
    Page,
    Paragraph,
    Section,
    Table,
    Verbatim,
    count,
    duration,
    figure,
    items,
    listing,
    render,
    section,
    size,
    strong,
    two_decimals,
)

Json = Mapping[str, Any]
_ROLES = {"base": "base", "source": "a source", "baseline": "a baseline", "recipe": "a recipe"}
_MARK = "M-4.2 0a4.2 4.2 0 1 0 8.4 0a4.2 4.2 0 1 0-8.4 0z"
_PLOT_WIDTH = 330  # px of a plot without its labels
_ROW_HEIGHT = 22


def render_comparison(record: Json) -> str:
    """The page of a record (`files.comparison_record`)."""
    recipes = [model for model in record["models"] if model["role"] == "recipe"]
    title = f"{listing([model['name'] for model in recipes])} compared"
    if len(title) > 100:
        title = f"{count(len(recipes), 'recipe')} compared"
    tasks = listing([task["name"] for task in record["tasks"]])
    sections = [
        _table(record),
        _normalised(record),
        _against_cost(record),
        _domains(record),
        _cost(record),
        _recipes(record),
    ]
    return render(
        Page(
            kind="Comparison",
            title=title,
            lede=f"{count(len(record['models']), 'model')} on {tasks}.",
            made=_made(record),
            key_figures=_key_figures(record),
            sections=[part for part in sections if part is not None],
        )
    )


def _made(record: Json) -> list[str]:
    return [
        record["created"].replace("T", " ").replace("+00:00", " UTC"),
        f"merge-cli {record['merge_cli']}",
        f"evaluated in {record['dtype']}",
        record["device"],
    ]


def _key_figures(record: Json) -> list[KeyFigure]:
    merges = [model for model in record["models"] if model["cost"]]
    field, sign = _ranking(record)
    best = max(merges, key=lambda model: sign * model[field]["value"]) if field else None
    figures = []
    if best is not None:
        figures.append(
            (
                "Best merge",
                best["name"],
                f"{_ranking_name(record)} {decimals(best[field]['value'])}",
            )
        )
        gain = best["gain"]
        if gain is not None:
            remark = "a difference" if excludes_zero(gain) else "may be chance"
            ends = with_interval(gain, "+").partition(" ")[2]
            figures.append(
                (
                    f"Better than {record['reference']} by",
                    decimals(gain["value"], "+"),
                    f"{ends}, {remark}" if ends else "of a single example",
                )
            )
        figures.append(
            (
                "Made in",
                duration(best["cost"]["seconds"]),
                f"{size(best['cost']['peak_rss'])} of memory",
            )
        )
    cheapest = min(merges, key=lambda model: model["cost"]["seconds"])
    figures.append(("Cheapest", cheapest["name"], duration(cheapest["cost"]["seconds"])))
    return [KeyFigure(name, value, remarks) for name, value, *remarks in figures]


def _table(record: Json) -> Section:
    heads, rows = used_columns(record)
    how = Markup("<br><br>").join([*legend(record), "bold: your recipes"])
    recipes = {model["name"] for model in record["models"] if model["role"] == "recipe"}
    cells = [[strong(name) if name in recipes else name, *values] for name, *values in rows]
    table = Table(heads, cells, right=len(heads) - 1)
    return section("Quality and cost", how, "", table, items(record["notes"]))


def _normalised(record: Json) -> Section | None:
    tasks = [task["name"] for task in record["tasks"] if task["normalised"]]
    if not tasks:
        return None
    models = record["models"]
    values = [
        [
            *(m["normalised"][task]["value"] for task in tasks),
            *([m["normalised_mean"]["value"]] if len(tasks) > 1 else []),
        ]
        for m in models
    ]
    heads = [*tasks, *(["mean"] if len(tasks) > 1 else [])]
    names = [charts.shorten(model["name"], 30) for model in models]
    axis = charts.Axis(heads, [charts.shorten(head, 11) for head in heads], "", 84)
    scale = Scale(
        lambda v: v, (-1, -0.5, 0, 0.5, 1), two_decimals, "0: base, 1: the domain's own expert"
    )
    best = [task for task in tasks if _best_merge(record, task) > 1]
    summary = (
        f"A merge beats the expert itself at {listing(best)}."
        if best
        else ("No merge is as good as a domain's own expert.")
    )
    how = (
        "How much of the way from the base to the domain's own expert a model goes. Below 0 it is "
        "worse than the base; colours end at ±1, numbers do not."
    )
    chart = charts.heat_map("Normalised quality", names, axis, values, scale, 26, two_decimals)
    return section("Between base and expert", how, summary, figure("Normalised quality.", chart))


def _best_merge(record: Json, task: str) -> float:
    merges = [model for model in record["models"] if model["cost"]]
    return max(float(model["normalised"][task]["value"]) for model in merges)


def _against_cost(record: Json) -> Section | None:
    field, sign = _ranking(record)
    merges = [model for model in record["models"] if model["cost"]]
    if field is None:
        return None
    points = [
        Point(
            m["name"],
            m["cost"]["seconds"],
            m[field]["value"],
            _ends(m[field]),
            _style(m["role"]),
            m["name"] in record["front"],
        )
        for m in merges
    ]
    how = (
        "Up is better, left is cheaper. The line is the Pareto front: no merge is both better and "
        "cheaper than a merge on it. Lines through points are 95 % intervals."
    )
    summary = f"On the front: {listing(record['front'])}."
    chart = plane(
        "Quality against cost",
        points,
        "wall time of the merge (logarithmic)",
        _ranking_name(record),
        number,
        duration,
        lower_is_better=sign < 0,
    )
    key = Markup(
        '<span class="dot s-0">recipes</span> \u2003 <span class="dot s-base">baselines</span>'
    )
    return section(
        "Quality against cost",
        how,
        summary,
        figure("Merges by cost.", chart),
        Paragraph(key, "soft"),
    )


def _domains(record: Json) -> Section:
    figures = []
    for task in record["tasks"]:
        name = task["name"]
        rows = [
            Dot(
                charts.shorten(m["name"], 30),
                m["scores"][name]["value"],
                _ends(m["scores"][name]),
                _style(m["role"]),
            )
            for m in record["models"]
        ]
        better = "less is better" if task["better"] == "lower" else "more is better"
        unit = f"{task['metric']}, {task['unit']} ({better})"
        caption = f"{name}: {task['metric']} over {count(task['examples'], 'example')}."
        figures.append(figure(caption, dots(caption, rows, number, unit)))
    how = (
        "Dots are values, lines 95 % bootstrap intervals over examples. Models whose intervals "
        "overlap may still differ: the same examples are hard for every model, which only the "
        "paired difference in the table takes into account."
    )
    return section("Domain by domain", how, "", *figures)


def _cost(record: Json) -> Section:
    rows = []
    for model in record["models"]:
        cost, evaluation_cost = model["cost"], model["evaluation_cost"]
        cells = ["–"] * 6
        if cost is not None:
            cells = [
                duration(cost["seconds"]),
                f"{cost['tokens']:,}",
                f"{cost['forward_passes']:,}",
                f"{cost['backward_passes']:,}",
                size(cost["peak_rss"]),
                "–" if cost["joules"] is None else f"{cost['joules']:.3g} J",
            ]
        rows.append(
            [
                model["name"],
                *cells,
                duration(evaluation_cost["seconds"]),
                f"{evaluation_cost['tokens']:,}",
            ]
        )
    heads = [
        "model",
        "merge: time",
        "tokens",
        "forward",
        "backward",
        "peak memory",
        "energy",
        "evaluation: time",
        "tokens",
    ]
    how = (
        "The cost of each merge, measured on its process, and of its evaluation. Tokens and passes "
        "are those of methods that learn or search. Energy is the whole machine's, where it has a "
        "meter that can be read."
    )
    return section("What it cost", how, "", Table(heads, rows, len(heads) - 1))


def _recipes(record: Json) -> Section:
    parts = [
        Details(f"{model['name']}, {_ROLES[model['role']]}", [Verbatim(model["recipe"])])
        for model in record["models"]
        if model["recipe"]
    ]
    return section("Recipes", "What was merged, as it was written.", "", *parts)


def _ranking(record: Json) -> tuple[str | None, float]:
    """The field that ranks models, and its sign: 1 where more is better, else -1."""
    sign = 1.0 if record["ranking"]["better"] == "higher" else -1.0
    field = {"normalised mean": "normalised_mean", "mean": "mean"}.get(record["ranking"]["by"])
    return field, sign


def _ranking_name(record: Json) -> str:
    if record["ranking"]["by"] == "normalised mean":
        return "normalised mean"
    return f"mean, {record['tasks'][0]['unit']}"


def _ends(score: Json) -> tuple[float, float] | None:
    return tuple(score["interval"]) if score["interval"] else None


def _style(role: str) -> str:
    return {"base": "s-merged", "source": "s-1", "baseline": "s-base", "recipe": "s-0"}[role]


@dataclass(frozen=True)
class Dot:
    """One model: its value, its interval (None: a single example), its style (page.css)."""

    name: str
    value: float
    ends: tuple[float, float] | None
    style: str


@dataclass(frozen=True)
class Point:
    """One merge: seconds, quality with its interval, whether it is on the front."""

    name: str
    x: float
    y: float
    ends: tuple[float, float] | None
    style: str
    on_front: bool


def dots(title: str, rows: Sequence[Dot], text: Format, unit: str) -> str:
    """A row for each model: its value as a dot, its interval as a line."""
    left = round(max(text_width(row.name) for row in rows)) + 14
    values = [v for row in rows for v in (row.value, *(row.ends or ()))]
    ticks = _ticks(min(values), max(values))
    top, bottom = 6, 6 + _ROW_HEIGHT * len(rows)

    def x_at(value: float) -> float:
        return left + (value - ticks[0]) / (ticks[-1] - ticks[0]) * _PLOT_WIDTH

    parts = [f'<path class="grid" d="M{x_at(t):.1f} {top}V{bottom}"/>' for t in ticks]
    parts += [caption(x_at(t), bottom + 17, text(t), "m num") for t in ticks]
    for i, row in enumerate(rows):
        y = top + (i + 0.5) * _ROW_HEIGHT
        parts.append(caption(left - 10, y + 4, row.name, "e"))
        tooltip = f"{row.name}: {text(row.value)}"
        if row.ends is not None:
            low, high = row.ends
            parts.append(f'<path class="whisker" d="M{x_at(low):.1f} {y:.1f}H{x_at(high):.1f}"/>')
            tooltip += f" (95 % from {text(low)} to {text(high)})"
        parts.append(_mark(x_at(row.value), y, row.style, tooltip))
    parts.append(caption(left, bottom + 36, unit, ""))
    return svg(title, left + _PLOT_WIDTH + 26, bottom + 46, parts)


def plane(
    title: str,
    points: Sequence[Point],
    x_unit: str,
    y_unit: str,
    text: Format,
    seconds: Format,
    *,
    lower_is_better: bool,
) -> str:
    """Quality over cost on a logarithmic axis, with the Pareto front as a line.

    Args:
        lower_is_better: small values of y are drawn at the top, so that better is always up.
    """
    left, top, width, height = 74, 30, 560, 300
    bottom = top + height
    low_x, high_x = _decades([point.x for point in points])
    values = [v for point in points for v in (point.y, *(point.ends or ()))]
    ticks = _ticks(min(values), max(values))

    def x_at(value: float) -> float:
        return left + width * math.log10(value / low_x) / math.log10(high_x / low_x)

    def y_at(value: float) -> float:
        share = (value - ticks[0]) / (ticks[-1] - ticks[0])
        return top + height * (share if lower_is_better else 1 - share)

    parts = [caption(left - 8, top - 14, y_unit, "")]
    for tick in ticks:
        parts.append(f'<path class="grid" d="M{left} {y_at(tick):.1f}h{width}"/>')
        parts.append(caption(left - 8, y_at(tick) + 4, text(tick), "e num"))
    for tick in _log_ticks(low_x, high_x):
        parts.append(f'<path class="grid" d="M{x_at(tick):.1f} {top}V{bottom}"/>')
        parts.append(caption(x_at(tick), bottom + 17, seconds(tick), "m num"))
    parts.append(caption(left, bottom + 38, x_unit, ""))
    front = sorted((p for p in points if p.on_front), key=lambda p: p.x)
    if front:
        steps = [f"M{x_at(front[0].x):.1f} {y_at(front[0].y):.1f}"]
        steps += [f"H{x_at(p.x):.1f}V{y_at(p.y):.1f}" for p in front[1:]]
        parts.append(f'<path class="front" d="{"".join(steps)}H{left + width}"/>')
    for point in points:
        parts += _whisker(x_at(point.x), point.ends, y_at)
        tooltip = f"{point.name}: {text(point.y)} in {seconds(point.x)}"
        parts.append(_mark(x_at(point.x), y_at(point.y), point.style, tooltip))
    parts += _names([(x_at(p.x), y_at(p.y), p.name, p.on_front) for p in points], left + width)
    return svg(title, left + width + 20, bottom + 48, parts)


def _whisker(
    x: float, ends: tuple[float, float] | None, y_at: Callable[[float], float]
) -> list[str]:
    if ends is None:
        return []
    return [f'<path class="whisker" d="M{x:.1f} {y_at(ends[0]):.1f}V{y_at(ends[1]):.1f}"/>']


def _names(points: Sequence[tuple[float, float, str, bool]], right: float) -> list[str]:
    """A name next to each point, moved down where it would cover another."""
    occupied: list[tuple[float, float, float]] = []
    parts = []
    for x, y, name, bold in sorted(points, key=lambda point: point[1]):
        width = text_width(name)
        start = x + 9 if x + 9 + width < right + 16 else x - 9 - width
        line = y + 4
        while any(abs(line - o) < 13 and start < e and s < start + width for s, e, o in occupied):
            line += 3
        occupied.append((start, start + width, line))
        parts.append(caption(start, line, name, "name strong" if bold else "name"))
    return parts


def _mark(x: float, y: float, style: str, tooltip: str) -> str:
    return titled(_MARK, f"mark {style}", tooltip, f' transform="translate({x:.1f} {y:.1f})"')


def _ticks(low: float, high: float) -> list[float]:
    """Four to eight round numbers that cover the range."""
    step = tick_step((high - low) or abs(high) or 1.0)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def _decades(values: Sequence[float]) -> tuple[float, float]:
    """The range of a logarithmic axis, with a margin; at least a factor of ten."""
    low, high = min(values) / 1.5, max(values) * 1.5
    if high / low < 10:
        middle = math.sqrt(low * high)
        low, high = middle / math.sqrt(10), middle * math.sqrt(10)
    return low, high


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, ...; only powers of ten over more than four of them."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1.0,) if last - first > 4 else (1.0, 2.0, 5.0)
    ticks = [f * 10.0**power for power in range(first, last + 1) for f in factors]
    return [tick for tick in ticks if low <= tick <= high]
