"""Page sections on how the sources relate: cosines, sign conflict, sizes, trimming.

Each has a finding in words and a chart. Without data a section says so in a line, because an empty
chart looks like a measurement of zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from merge_cli.report import charts
from merge_cli.report.charts import Scale, Series, Values
from merge_cli.report.numbers import bare_percent, number, percent, three_decimals, two_decimals
from merge_cli.report.page import (
    MAX_ROWS,
    Details,
    Part,
    Section,
    Table,
    figure,
    or_dash,
    root,
    section,
)
from merge_cli.report.relations import (
    NO_LAYERS,
    Json,
    RelationsView,
    by_layer,
    pair_rows,
    pairs_of,
    row,
)

_SEEN = 0.05  # bars that differ by a smaller share of their height say less than a sentence


def alike(view: RelationsView) -> Section:
    how = (
        "Cosine is 1 where two sources moved the same way, 0 where they have nothing in common, "
        "−1 where they pull apart. Colour deepens with the square root, so that small values show."
    )
    if view.kind == "weights":
        how = (
            "Cosine of the weights themselves: close to 1 for models of one family, near 0 for "
            "models that were trained independently. Colour deepens with the square root."
        )
    how += view.measured_on
    pairs = pairs_of(view)
    if not pairs:
        return section("How alike the sources are", "", _no_pairs(view, "Cosines"))
    scale = Scale(root, (-1, -0.5, -0.1, 0, 0.1, 0.5, 1), number, "cosine")
    (low, a), (high, b) = min(pairs), max(pairs)
    summary = f"Most alike: {b} ({three_decimals(high)}); least: {a} ({three_decimals(low)})."
    if len(pairs) == 1:
        summary = f"The cosine of {a} is {three_decimals(low)}."
    summary += _outside(view, _cosines_in_words)
    axis = charts.matrix_axis(view.labels)
    chart = charts.heat_map(
        "Cosine, whole model", view.labels, axis, view.total["cosine"], scale, 34, three_decimals
    )
    rows = pair_rows(view, "cosine")
    of_many = ", mean of each source with the others" if len(rows) == len(view.models) > 3 else ""
    return section(
        "How alike the sources are",
        how,
        summary,
        figure(f"Cosine between {view.kind}, whole model.", chart),
        by_layer(view, f"Cosine between {view.kind}{of_many}", rows, scale, two_decimals),
    )


def conflict(view: RelationsView) -> Section:
    how = (
        "The share of elements that some sources raise and others lower, so that a plain average "
        f"cancels them. {len(view.models)} unrelated sources that change every element would "
        f"be in conflict on {percent(1 - 2.0 ** (1 - len(view.models)))}."
    )
    total_conflict = conflict_of(view)
    if total_conflict is None:
        return section("Sign conflict", "", _no_pairs(view, "Signs"))
    summary = f"{percent(total_conflict)} of elements are in conflict{_extremes(view)}."
    how += view.measured_on
    values = view.column("conflict")
    figures: list[Part] = []
    shares = [value for value in values if value is not None]
    if shares and max(shares) - min(shares) < _SEEN * max(shares):
        summary += f" Every {view.column_name} is alike."
    elif view.layers:
        bars = charts.bars(
            "Sign conflict by layer", view.axis, values, percent, "elements", total_conflict
        )
        figures.append(figure(f"Elements in conflict, by {view.column_name}.", bars))
    scale = Scale(lambda v: root(2 * v - 1), (0, 0.4, 0.5, 0.6, 1), percent, "same sign")
    axis = charts.matrix_axis(view.labels)
    agreement = view.total["sign_agreement"]
    chart = charts.heat_map(
        "Sign agreement, whole model", view.labels, axis, agreement, scale, 34, bare_percent
    )
    figures.append(figure("Elements of the same sign, of those that both sources change.", chart))
    return section("Sign conflict", how, summary, *figures)


def sizes(view: RelationsView) -> Section:
    title = "How far the sources are from the base"
    how = (
        "‖δ‖/‖θ₀‖: the norm of a source's change, over the norm of the base. A source far above "
        "the others dominates a plain average."
    )
    relative, change = view.total["relative_norm"], view.total["change"]
    if change is not None:
        how += " “merged” is the change of the merge itself."
    how += view.measured_on
    if relative is None:
        return section(title, "", "Not measured: this method merges weights, not changes.")
    summary = _each(view, relative)
    merged = "" if change is None else f"; the merge {percent(change)}"
    chart = series(view, "relative_norm", "‖δ‖/‖θ₀‖", view.column("change"))
    summary = f"Whole model: {summary}{merged}."
    summary += _outside(view, lambda group: _sizes_in_words(view, group))
    return section(title, how, summary, chart)


def kept(view: RelationsView) -> Section | None:
    """None for a method that trims nothing."""
    title = "What trimming kept"
    how = "The share of each source's elements that the method kept before it merged them."
    if view.total["kept"] is None:
        return None
    summary = f"Whole model: {_each(view, view.total['kept'])}"
    how += view.measured_on
    if view.layers and _is_flat(view, "kept"):  # equal shares by design: the lines would coincide
        return section(title, how, f"{summary}; the same in every layer.")
    return section(title, how, f"{summary}.", series(view, "kept", "elements kept"))


def _outside(view: RelationsView, describe: Callable[[Json], str]) -> str:
    """A large tensor outside the layers, usually the embedding, which charts by layer leave out."""
    if not view.layers or not view.outside:
        return ""
    group = view.outside[0]
    share = group["count"] / view.total["count"]
    description = describe(group)
    if share < 0.02 or not description:
        return ""
    name = group["name"]
    return f" Not drawn by layer: {name}, {percent(share)} of the elements, with {description}."


def _cosines_in_words(group: Json) -> str:
    values = [v for i, row in enumerate(group["cosine"] or []) for v in row[i + 1 :]]
    present = [v for v in values if v is not None]
    if not present:
        return ""
    low, high = three_decimals(min(present)), three_decimals(max(present))
    return f"a cosine of {low}" if low == high else f"cosines from {low} to {high}"


def _sizes_in_words(view: RelationsView, group: Json) -> str:
    if group["relative_norm"] is None:
        return ""
    change = group["change"]
    merged = f"; the merge {percent(change)}" if change is not None else ""
    return f"{_each(view, group['relative_norm'])}{merged}"


def _is_flat(view: RelationsView, field: str) -> bool:
    """Whether every layer has the share of the whole model, within a hundredth of it."""
    return all(
        value is None or total is None or abs(value - total) <= 0.01 * total
        for i, total in enumerate(view.total[field])
        for value in view.column(field, i)
    )


def _each(view: RelationsView, values: Values) -> str:
    """The value of each source, or the range of many."""
    present = [(v, label) for v, label in zip(values, view.labels, strict=True) if v is not None]
    if len(present) > charts.MAX_LINES:
        (low, smallest), (high, largest) = min(present), max(present)
        return f"from {percent(low)} ({smallest}) to {percent(high)} ({largest})"
    return ", ".join(f"{label} {percent(value)}" for value, label in present) or "no data"


def series(view: RelationsView, field: str, unit: str, merged: Values | None = None) -> Part | None:
    """One line for each source; with many sources, rows of a heat map."""
    rows = [view.column(field, i) for i in range(len(view.models))]
    if not view.layers:
        return NO_LAYERS
    if all(value is None for row in rows for value in row):
        return None
    message = unit[0].upper() + unit[1:]
    by_name: dict[str, Values] = dict(zip(view.labels, rows, strict=True))
    if len(rows) <= charts.MAX_LINES:
        caption = f"{message}, by {view.column_name}."
        series = [Series(name, row, i) for i, (name, row) in enumerate(by_name.items())]
        if merged is not None and any(value is not None for value in merged):
            series.append(Series("merged", merged, "merged"))
        return figure(caption, charts.lines(caption, view.axis, series, percent, unit))
    top = max((value for row in rows for value in row if value is not None), default=0.0) or 1.0
    scale = Scale(lambda v: v / top, (0, top / 2, top), percent, unit)
    if merged is not None and any(value is not None for value in merged):
        by_name["merged"] = merged
    return by_layer(view, message, by_name, scale, bare_percent)


def groups(groups: Sequence[Json]) -> Details:
    """A table of the numbers in the charts, with the tensors outside the layers."""
    heads = ["group", "elements", "sign conflict", "change", "‖δ‖/‖θ₀‖", "kept"]
    rows = [
        [
            g["name"],
            f"{g['count']:,}",
            or_dash(g["conflict"], percent),
            or_dash(g["change"], percent),
            row(g["relative_norm"]),
            row(g["kept"]),
        ]
        for g in groups[:MAX_ROWS]
    ]
    title = "Layers, and the tensors outside them"
    return Details(title, [Table(heads, rows, right=5)])


def _no_pairs(view: RelationsView, measure: str) -> str:
    """Why there is nothing to say about pairs of sources."""
    single = len(view.models) < 2
    return (
        "One source: there is nothing to compare it with."
        if single
        else f"{measure}: not measured."
    )


def conflict_of(view: RelationsView) -> float | None:
    """The share in conflict; None where signs were not compared (too many sources)."""
    share: float | None = view.total["conflict"]
    return share if view.total["sign_agreement"] is not None else None


def _extremes(view: RelationsView) -> str:
    """Which layers have most and least conflict, as the end of a sentence."""
    values = view.column("conflict")
    present = [(v, name) for v, name in zip(values, view.axis.names, strict=True) if v is not None]
    if len(present) < 2:
        return ""
    (low, lowest), (high, highest) = min(present), max(present)
    return f", from {percent(low)} ({lowest}) to {percent(high)} ({highest})"
