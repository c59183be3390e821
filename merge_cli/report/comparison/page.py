"""comparison.html: quality and cost of every model on one page, with nothing to load."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from merge_cli.report import charts
from merge_cli.report.charts import Scale
from merge_cli.report.comparison.plots import Dot, Point, dots, plane
from merge_cli.report.comparison.table import (
    decimals,
    excludes_zero,
    legend,
    number,
    used,
    with_ends,
)
from merge_cli.report.page import (
    Details,
    KeyFigure,
    Page,
    Paragraph,
    Section,
    Table,
    Verbatim,
    figure,
    items,
    render,
    section,
    strong,
)
from merge_cli.report.words import count, duration, listing, size, two_decimals

Json = Mapping[str, Any]
_ROLES = {"base": "base", "source": "a source", "baseline": "a baseline", "recipe": "a recipe"}


def render_comparison(record: Json) -> str:
    """The page of a record (`record.comparison_record`)."""
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
    cells = []
    if best is not None:
        cells.append(
            ("Best merge", best["name"], f"{_by(record)} {decimals(best[field]['value'])}")
        )
        gain = best["gain"]
        if gain is not None:
            said = "a difference" if excludes_zero(gain) else "may be chance"
            ends = with_ends(gain, "+").partition(" ")[2]
            cells.append(
                (
                    f"Better than {record['reference']} by",
                    decimals(gain["value"], "+"),
                    f"{ends}, {said}" if ends else "of a single example",
                )
            )
        cells.append(
            (
                "Made in",
                duration(best["cost"]["seconds"]),
                f"{size(best['cost']['peak_rss'])} of memory",
            )
        )
    cheapest = min(merges, key=lambda model: model["cost"]["seconds"])
    cells.append(("Cheapest", cheapest["name"], duration(cheapest["cost"]["seconds"])))
    return [KeyFigure(name, value, remarks) for name, value, *remarks in cells]


def _table(record: Json) -> Section:
    heads, rows = used(record)
    how = Markup("<br>").join(legend(record))
    recipes = {model["name"] for model in record["models"] if model["role"] == "recipe"}
    cells = [[strong(name) if name in recipes else name, *measured] for name, *measured in rows]
    table = Table(heads, cells, right=len(heads) - 1)
    return section("Quality and cost", how, "", table, items(record["notes"]))


def _normalised(record: Json) -> Section | None:
    tasks = [task["name"] for task in record["tasks"] if task["normalised"]]
    if not tasks:
        return None
    models = record["models"]
    values = [
        [*(m["normalised"][task]["value"] for task in tasks), m["normalised_mean"]["value"]]
        for m in models
    ]
    names = [charts.shorten(model["name"], 30) for model in models]
    axis = charts.Axis([*tasks, "mean"], [charts.shorten(t, 11) for t in (*tasks, "mean")], "", 84)
    scale = Scale(
        lambda v: v, (-1, -0.5, 0, 0.5, 1), two_decimals, "0: base, 1: the domain's own expert"
    )
    best = [task for task in tasks if _best_merge(record, task) > 1]
    found = (
        f"A merge beats the expert itself at {listing(best)}."
        if best
        else ("No merge is as good as a domain's own expert.")
    )
    how = (
        "How much of the way from the base to the domain's own expert a model goes. Below 0 it is "
        "worse than the base; colours end at ±1, numbers do not."
    )
    chart = charts.heat_map("Normalised quality", names, axis, values, scale, 26, two_decimals)
    return section("Between base and expert", how, found, figure("Normalised quality.", chart))


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
        "Up is better, left is cheaper. The line is the Pareto front: for a merge on it there is "
        "none that is both better and cheaper. Lines through points are 95 % intervals."
    )
    found = f"On the front: {listing(record['front'])}."
    chart = plane(
        "Quality against cost",
        points,
        "wall time of the merge (logarithmic)",
        _by(record),
        number,
        duration,
        low_is_good=sign < 0,
    )
    key = Markup(
        '<span class="dot s-0">recipes</span> \u2003 <span class="dot s-base">baselines</span>'
    )
    return section(
        "Quality against cost", how, found, figure("Merges by cost.", chart), Paragraph(key, "soft")
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
        "Dots are values, lines 95 % bootstrap intervals over examples. Intervals that overlap may "
        "still differ: the same examples are hard for every model, which only the paired "
        "difference in the table takes into account."
    )
    return section("Domain by domain", how, "", *figures)


def _cost(record: Json) -> Section:
    rows = []
    for model in record["models"]:
        cost, spent = model["cost"], model["evaluation_cost"]
        made = ["–"] * 6
        if cost is not None:
            made = [
                duration(cost["seconds"]),
                f"{cost['tokens']:,}",
                f"{cost['forward_passes']:,}",
                f"{cost['backward_passes']:,}",
                size(cost["peak_rss"]),
                "–" if cost["joules"] is None else f"{cost['joules']:.3g} J",
            ]
        rows.append([model["name"], *made, duration(spent["seconds"]), f"{spent['tokens']:,}"])
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
        "What each merge took to make, measured on its own process, and what evaluating it took. "
        "Tokens and passes are of methods that learn or search. Energy is the whole machine's, "
        "where it has a meter that may be read."
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
    """The field that orders models, and 1 where more of it is better."""
    sign = 1.0 if record["ranking"]["better"] == "higher" else -1.0
    field = {"normalised mean": "normalised_mean", "mean": "mean"}.get(record["ranking"]["by"])
    return field, sign


def _by(record: Json) -> str:
    if record["ranking"]["by"] == "normalised mean":
        return "normalised mean"
    return f"mean, {record['tasks'][0]['unit']}"


def _ends(score: Json) -> tuple[float, float] | None:
    return tuple(score["interval"]) if score["interval"] else None


def _style(role: str) -> str:
    return {"base": "s-merged", "source": "s-1", "baseline": "s-base", "recipe": "s-0"}[role]
