"""The report page's sections on searching: what was found, how, and whether it was worth it.

Their data is in merge_report.json under `search` (docs/evolve.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from merge_cli.evolve.verdict import shown, verdict_in_words
from merge_cli.recipe.reference import short_labels
from merge_cli.report import charts
from merge_cli.report.charts import Axis, Series, caption, svg, titled
from merge_cli.report.numbers import count, duration, number, percent, size
from merge_cli.report.page import Part, Section, Table, code, figure, items, section, strong

Json = Mapping[str, Any]
_POINTS = 60  # of a convergence curve
_SHOWN = 20  # parameters in the chart of importance


def search_sections(report: Json) -> list[Section]:
    """The sections of a report of a search; none for other methods."""
    search = report.get("search")
    if not search:
        return []
    sections = [_worth(search), _convergence(search)]
    if len(search["goals"]) > 1:
        sections.append(_front(search))
    return [*sections, _values(search), _cost(search)]


def worth(search: Json) -> str:
    """Whether the search was better than every merge without it; empty where there is none."""
    verdict = search["verdict"]
    if verdict is None:
        return ""
    summary = f"{verdict_in_words(search)}."
    if not verdict["better"]:
        return f"NO IMPROVEMENT: {summary}"
    return summary[0].upper() + summary[1:]


def _worth(search: Json) -> Section:
    scores, verdict = search["scores"], search["verdict"]
    title = "Whether it was worth it"
    how = Markup(
        "Scores on the split {}, higher is better: the objective's goals, weighted."
        if search.get("maximised")
        else "Scores on the split {}, lower is better: the objective's goals, weighted. Goals that "
        "are maximised count with a minus."
    ).format(code(search["split"]))
    if verdict is None:
        return section(title, how, "There is nothing to compare with.")
    summary = worth(search)
    names = dict(zip(scores, short_labels(list(scores)), strict=True))
    tasks = list(next(iter(scores.values()))["tasks"])
    best = min(score["score"] for score in scores.values())
    rows = [
        [
            strong(names[name]) if item["score"] == best else names[name],
            shown(search, item["score"], ".4f"),
            *(f"{item['tasks'][task]:.4f}" for task in tasks),
        ]
        for name, item in scores.items()
    ]
    heads = ["model", "score", *tasks]
    table = Table(heads, rows, right=len(heads) - 1)
    return section(title, how, summary, items(search["warnings"]), table)


def _convergence(search: Json) -> Section:
    history = search["history"]
    scored = [entry for entry in history if entry["score"] is not None]
    title = "Convergence"
    if not scored:
        return section(title, "", "No candidate has a score.")
    first = scored[0]["score"]
    how = (
        "How much better than the first candidate the best so far is, by number of candidates: a "
        "line that has long been flat says that searching longer would have found little."
    )
    step = -(-len(history) // _POINTS)
    picked = [history[min(i + step - 1, len(history) - 1)] for i in range(0, len(history), step)]
    gains = [None if entry["best"] is None else max(0.0, first - entry["best"]) for entry in picked]
    width = max(12.0, min(56.0, 700 / max(1, len(picked))))
    every = max(1, -(-44 // int(width)))
    numbers = [str(entry["number"] + 1) for entry in picked]
    ticks = [number if i % every == 0 else "" for i, number in enumerate(numbers)]
    axis = Axis([f"candidate {number}" for number in numbers], ticks, "number", width)
    chart = charts.lines(title, axis, [Series("best so far", gains, 0)], number, "score gained")
    failed = sum(bool(entry["error"]) for entry in history)
    best = search["best"]
    text = (
        f"{count(len(history), 'candidate')} by {search['optimizer']}, from "
        f"{shown(search, first, '.5g')} to {shown(search, best['score'], '.5g')} on the search "
        f"split; {search['ended']}."
    )
    if failed:
        errors = dict.fromkeys(
            item["error"].partition("\n")[0] for item in history if item["error"]
        )
        text += f" {count(failed, 'candidate')} failed: {'; '.join(list(errors)[:3])}."
    return section(title, how, text, figure("Score gained over the first candidate.", chart))


def _front(search: Json) -> Section:
    goals = search["goals"][:2]
    how = (
        "Each candidate's share of the score from two goals, lower is better in both: goals that "
        "are maximised count with a minus. Filled points are on the front: no other candidate is "
        "better in every goal."
    )
    scored = [item for item in search["history"] if item["parts"] is not None]
    if len(scored) < 2:
        return section("Pareto front", how, "Too few candidates have a score.")
    on_front = set(search["front"])
    points = [(entry["parts"][0], entry["parts"][1], entry["number"]) for entry in scored]
    text = f"{count(len(on_front), 'candidate')} of {len(scored)} on the front"
    more = (
        f"; drawn are the first two of {len(search['goals'])} goals"
        if len(search["goals"]) > 2
        else ""
    )
    chart = _scatter(points, goals, on_front, search["best"]["number"])
    return section("Pareto front", how, f"{text}{more}.", figure("All candidates.", chart))


def _scatter(
    points: Sequence[tuple[float, float, int]], goals: Sequence[str], strong: set[int], best: int
) -> str:
    left, top, wide, high = 80.0, 30.0, 520.0, 280.0
    ends = [(min(p[i] for p in points), max(p[i] for p in points)) for i in (0, 1)]

    def at(value: float, axis: int) -> float:
        low, highest = ends[axis]
        share = (value - low) / (highest - low) if highest > low else 0.5
        return left + wide * share if axis == 0 else top + high * (1 - share)

    parts = [
        caption(left - 8, top - 14, goals[1], ""),
        caption(left + wide, top + high + 36, goals[0], "e"),
    ]
    for share in (0.0, 0.5, 1.0):
        y, x = top + high * (1 - share), left + wide * share
        parts.append(f'<path class="grid" d="M{left} {y:.1f}h{wide}"/>')
        values = [low + share * (highest - low) for low, highest in ends]
        parts.append(caption(left - 8, y + 4, number(values[1]), "e num"))
        parts.append(caption(x, top + high + 17, number(values[0]), "m num"))
    for x_value, y_value, index in sorted(points, key=lambda p: p[2] in strong):
        label = f"candidate {index + 1}: {number(x_value)}, {number(y_value)}"
        style = "s-merged" if index == best else "s-0" if index in strong else "s-5"
        size_ = 1.3 if index == best else 1.0 if index in strong else 0.6
        where = f' transform="translate({at(x_value, 0):.1f} {at(y_value, 1):.1f})scale({size_})"'
        parts.append(titled("M-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0z", f"mark {style}", label, where))
    return svg("Pareto front", left + wide + 20, top + high + 48, parts)


def _values(search: Json) -> Section:
    values = search["best"]["values"]
    shares = search["importance"]
    rows = [[name, _plain(value)] for name, value in values.items()]
    for row in rows if shares else []:
        row.append(percent(shares[row[0]]) if row[0] in shares else "–")
    ranked = sorted(shares.items(), key=lambda pair: -pair[1])[:_SHOWN]
    figures: list[Part] = []
    if any(share for _, share in ranked):
        bars = [(charts.shorten(name, 44), share, percent(share)) for name, share in ranked]
        figures.append(
            figure(
                "Share of the scores' variance that a parameter explains alone.",
                charts.side_bars("Importance", bars),
            )
        )
    heads = ["sets", "value", *(["importance"] if shares else [])]
    how = "The values that were found."
    if shares:
        how += (
            " Importance is of each parameter alone (a parabola in ranks), over the candidates "
            "that were tried; it says nothing of interactions."
        )
    else:
        how += " There are too few candidates to say which of them mattered."
    summary = f"Candidate {search['best']['number'] + 1}, by {', '.join(search['searched'])}."
    return section(
        "What was found",
        how,
        summary,
        *figures,
        Table(heads, rows, right=len(heads) - 1),
    )


def _cost(search: Json) -> Section:
    cost = search["cost"]
    rate = cost["evaluations"] / cost["seconds"] if cost["seconds"] else 0.0
    rows = [
        ("candidates", f"{cost['evaluations']:,}, {cost['failed']} failed"),
        ("evaluating, all workers together", duration(cost["seconds"])),
        ("candidates/s", f"{rate:.2f}" if rate else "–"),
        ("tokens", f"{cost['tokens']:,}"),
        ("forward passes", f"{cost['forward_passes']:,}"),
        ("tokens of the comparison above", f"{cost['report_tokens']:,}"),
        ("workers", f"{cost['workers']}"),
        ("peak memory, resident", size(cost["peak_rss"])),
        *([("peak memory, GPU", size(cost["peak_vram"]))] if cost["peak_vram"] else []),
        ("sources wait in", cost["residency"]),
    ]
    return section("What searching cost", "", "", Table(["", ""], rows, right=1))


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)
