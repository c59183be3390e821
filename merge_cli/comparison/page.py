"""comparison.html: tables and plots of every model's quality and cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from merge_cli.comparison.tables import (
    decimals,
    excludes_zero,
    legend,
    used_columns,
    with_interval,
)
from merge_cli.report import charts
from merge_cli.report.charts import Scale
from merge_cli.report.numbers import count, duration, number, size, two_decimals
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
    listing,
    render,
    section,
    strong,
)
from merge_cli.report.plots import Dot, Point, dots, plane

Json = Mapping[str, Any]
_ROLES = {"base": "base", "source": "a source", "baseline": "a baseline", "recipe": "a recipe"}


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
            lede=_lede(record, tasks),
            made=_made(record),
            key_figures=_key_figures(record),
            sections=[part for part in sections if part is not None],
        )
    )


def _lede(record: Json, tasks: str) -> str:
    conclusion = record["verdict"]
    text = f"{count(len(record['models']), 'model')} on {tasks}."
    return f"{conclusion['text']} ({text})" if conclusion else text


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
    if not merges:
        return []
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
    if not merges:
        return 0.0
    return max(float(model["normalised"][task]["value"]) for model in merges)


def _against_cost(record: Json) -> Section | None:
    field, sign = _ranking(record)
    merges = [model for model in record["models"] if model["cost"]]
    if field is None or not merges:
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
        "cheaper than a merge on it. Lines through points are 95 % intervals. Dotted lines are the "
        "base and the sources, which cost nothing."
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
        levels=[(m["name"], m[field]["value"]) for m in record["models"] if not m["cost"]],
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
