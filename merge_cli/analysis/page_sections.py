"""The analysis page's own sections, each with how to read it, a finding and heat maps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from merge_cli.analysis.measures import pairs
from merge_cli.analysis.model_set import KINDS
from merge_cli.analysis.result import Analysis
from merge_cli.report import charts
from merge_cli.report.charts import Axis, Scale, Values, text_width
from merge_cli.report.page import (
    Part,
    Section,
    bare_percent,
    cosine,
    figure,
    mean,
    percent,
    root,
    section,
    two_decimals,
)
from merge_cli.report.sections import RelationsView, by_layer, pair_rows, series

_MAX_MAPS = 6  # sources that get a heat map of their own
_MAX_PAIRS = 10  # columns of the cosines by kind
_PAIR = 110.0  # px for the name of a pair


def kinds(analysis: Analysis, view: RelationsView) -> Section:
    """Where the changes are: kinds of modules by sources, and by layers."""
    how = (
        "‖δ‖/‖θ₀‖ by kind of module, found in the tensors' names. Light rows are modules that a "
        "fine-tune hardly touched. A layer's norms and biases are small tensors, whose changes say "
        "little about the whole."
    )
    named = [kind.name for kind in analysis.kinds]
    values = [list(kind.relative_norm or ()) for kind in analysis.kinds]
    scale = _share(values, "‖δ‖/‖θ₀‖")
    caption = "‖δ‖/‖θ₀‖ of each source, by kind of module."
    axis = charts.matrix_axis(view.labels)
    figures: list[Part | None] = [
        figure(caption, charts.heat_map(caption, named, axis, values, scale, 24, bare_percent))
    ]
    several = len(analysis.models) > 1
    if view.layers:
        figures += _maps(analysis, view)
    if several:
        figures += [_conflicts(analysis, view), _cosines(analysis, view)]
    highest = [
        (max((v, name) for v, name in zip(column, named, strict=True) if v is not None))
        for column in zip(*values, strict=True)
        if any(v is not None for v in column)
    ]
    found = "Most changed: " + ", ".join(
        f"{name} by {label} ({percent(value)})"
        for (value, name), label in list(zip(highest, view.labels, strict=False))[:_MAX_MAPS]
    )
    return section("Where the changes are", how, f"{found}.", *figures)


def _maps(analysis: Analysis, view: RelationsView) -> list[Part | None]:
    """A heat map for each source, all on one scale."""
    values = [cell.relative_norm or () for cell in analysis.cells]
    scale = _share(values, "‖δ‖/‖θ₀‖")
    figures: list[Part | None] = []
    for s, label in enumerate(view.labels[:_MAX_MAPS]):
        message = f"{label}: ‖δ‖/‖θ₀‖" if len(view.labels) > 1 else "‖δ‖/‖θ₀‖"
        figures.append(_cells(analysis, view, message, [_at(row, s) for row in values], scale))
    return figures


def _conflicts(analysis: Analysis, view: RelationsView) -> Part | None:
    """Sign conflict by kind and layer, of the elements that several sources change."""
    values = [
        cell.conflict / cell.shared if cell.shared and cell.conflict is not None else None
        for cell in analysis.cells
    ]
    scale = Scale(lambda v: v, (0, 0.5, 1), percent, "of them")
    message = "Sign conflict, of the elements that several sources change"
    return _cells(analysis, view, message, values, scale)


def _cells(
    analysis: Analysis, view: RelationsView, what: str, values: Sequence[float | None], scale: Scale
) -> Part | None:
    """A heat map of kinds of modules by layers; `values` follow the analysis's cells."""
    if not view.layers:
        return None
    keys = [(cell.name, cell.kind) for cell in analysis.cells]
    result = dict(zip(keys, values, strict=True))
    rows: dict[str, Values] = {
        kind: [result.get((layer["name"], kind)) for layer in view.layers]
        for kind in KINDS
        if any(key[1] == kind for key in keys)
    }
    return by_layer(view, what, rows, scale, bare_percent)


def _cosines(analysis: Analysis, view: RelationsView) -> Part:
    """Cosines by kind of module: a column for each pair, or the mean of all where they are many."""
    found = [pairs(kind.cosine) for kind in analysis.kinds]
    places = list(dict.fromkeys((i, j) for row in found for i, j, _ in row))
    names = [f"{view.labels[i]} – {view.labels[j]}" for i, j in places]
    rows: list[Values] = [[row.get(at) for at in places] for row in map(_by_place, found)]
    ticks = [f"{i + 1} – {j + 1}" for i, j in places]
    if len(places) > _MAX_PAIRS:
        names = ticks = ["mean of all"]
        rows = [[mean(row)] for row in rows]
    fits = all(text_width(name) <= _PAIR for name in names)
    axis = Axis(names, names if fits else ticks, "", _PAIR + 8.0 if fits else 56.0)
    scale = Scale(root, (-1, -0.5, -0.1, 0, 0.1, 0.5, 1), cosine, "cosine")
    caption = "Cosine between task vectors, by kind of module."
    if not fits:
        numbered = (
            view.labels
            if view.labels[0].startswith("1 ")
            else [f"{i} {label}" for i, label in enumerate(view.labels, 1)]
        )
        caption += f" Columns are pairs: {', '.join(numbered)}."
    named = [kind.name for kind in analysis.kinds]
    return figure(caption, charts.heat_map(caption, named, axis, rows, scale, 24, two_decimals))


def _by_place(row: Sequence[tuple[int, int, float]]) -> dict[tuple[int, int], float]:
    return {(i, j): value for i, j, value in row}


def unchanged(view: RelationsView) -> Section:
    """Sparsity, and changes too small for a step of bfloat16."""
    total = view.total
    how = (
        "Elements whose value is exactly the base's. Of the others, those that moved by one step "
        "of bfloat16 or less: what a weight below one half may round away in a bfloat16 merge."
    )
    small = ", ".join(
        f"{label} {percent(value)}"
        for label, value in zip(view.labels, total["one_step"], strict=True)
        if value is not None
    )
    known = [
        f"{label} {percent(value)}"
        for label, value in zip(view.labels, total["unchanged"], strict=True)
    ]
    found = f"Unchanged: {_some(known)}."
    if small:
        found += f" Of the changes, one step or less: {_some(small.split(', '))}."
    return section(
        "Unchanged and hardly changed", how, found, series(view, "unchanged", "elements unchanged")
    )


def largest(analysis: Analysis, view: RelationsView) -> Section:
    """Overlap of the largest changes, against chance."""
    how = (
        "The largest 1 % of each source's changes, tensor by tensor; the share of the smaller set "
        "that both sources have. Sources that change the same weights most compete for them."
    )
    total = analysis.total
    assert total is not None
    known = pairs(total.overlap)
    if not known:
        return section("Overlap of the largest changes", how, "Not measured.")
    chances = [v for _, _, v in pairs(total.overlap_chance)]
    i, j, most = max(known, key=lambda found: found[2])
    chance = mean(chances) or 0.0
    found = (
        f"Largest: {view.labels[i]} and {view.labels[j]} ({percent(most)}); independent sources "
        f"would share {percent(chance)}."
    )
    off_diagonal = [
        [value if i != j else None for j, value in enumerate(row)]
        for i, row in enumerate(total.overlap or ())
    ]
    axis = charts.matrix_axis(view.labels)
    rows = pair_rows(view, "overlap")
    scale = _share([*off_diagonal, *rows.values()], "of the smaller set")
    caption = "Largest changes that two sources share, whole model."
    whole = charts.heat_map(caption, view.labels, axis, off_diagonal, scale, 34, bare_percent)
    return section(
        "Overlap of the largest changes",
        how,
        found,
        figure(caption, whole),
        by_layer(view, "Largest changes that two sources share", rows, scale, bare_percent),
    )


def ranks(analysis: Analysis, view: RelationsView) -> Section:
    """Effective ranks of the sampled matrices."""
    how = (
        "exp of the entropy of a change's normalised singular values (Roy and Vetterli, 2007), as "
        "a share of the sample's smaller side: near 0 for a merged LoRA, and about "
        f"{percent(0.8)} for noise in a square matrix. A few matrices of each kind are sampled, "
        "at most 256 rows and 256 columns of each."
    )
    if not analysis.spectra:
        return section("How many directions", how, "No matrix was large enough to sample.")
    rows = [_short_name(one.name) for one in analysis.spectra]
    shares = [
        [None if r is None else r / min(item.rows, item.columns) for r in item.effective_rank]
        for item in analysis.spectra
    ]
    averages = [
        f"{label} {percent(value)}"
        for label, column in zip(view.labels, zip(*shares, strict=True), strict=True)
        if (value := mean(column)) is not None
    ]
    scale = Scale(lambda v: v, (0, 0.5, 1), percent, "of the smaller side")
    caption = "Effective rank of the sampled changes, % of the sample's smaller side."
    axis = charts.matrix_axis(view.labels)
    chart = charts.heat_map(caption, rows, axis, shares, scale, 22, bare_percent)
    return section("How many directions", how, f"Mean: {_some(averages)}.", figure(caption, chart))


def weights(analysis: Analysis, view: RelationsView) -> Section:
    """Without a base: how far the models are from one another."""
    how = (
        "‖θᵢ − θⱼ‖ over the geometric mean of the two norms. Without the base that the models "
        "came from, changes, signs and conflicts cannot be told from what they inherited."
    )
    total = analysis.total
    assert total is not None
    i, j, most = max(pairs(total.distance), key=lambda found: found[2])
    axis: Axis = charts.matrix_axis(view.labels)
    scale = _share(total.distance, "of the norm")
    caption = "Distance between the models, whole model."
    whole = charts.heat_map(caption, view.labels, axis, total.distance, scale, 34, bare_percent)
    rows = pair_rows(view, "distance")
    return section(
        "How far the models are from one another",
        how,
        f"Farthest: {view.labels[i]} and {view.labels[j]} ({percent(most)}).",
        figure(caption, whole),
        by_layer(
            view,
            "Distance between the models",
            rows,
            _share(rows.values(), "of the norm"),
            bare_percent,
        ),
    )


def _share(rows: Iterable[Iterable[float | None]], unit: str) -> Scale:
    """From 0 to the largest value; by its root, so that small values show."""
    known = [v for row in rows for v in row if v is not None]
    top = max(known, default=0.0) or 1.0
    return Scale(lambda v: root(v / top), (0, top / 4, top), percent, unit)


def _at(row: Sequence[float | None] | None, place: int) -> float | None:
    return None if row is None else row[place]


def _short_name(name: str) -> str:
    """A tensor's name without what every name has."""
    short = name.removesuffix(".weight").removeprefix("model.").removeprefix("language_model.")
    return charts.shorten(short, 34)


def _some(words: Sequence[str]) -> str:
    rest = len(words) - charts.MAX_LINES
    return ", ".join(words) if rest <= 0 else f"{', '.join(words[:6])} and {rest} more"
