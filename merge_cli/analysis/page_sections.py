"""Sections with charts of the analysis page: where changes are, overlaps, ranks, distances."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from merge_cli.analysis.measures import pairs
from merge_cli.analysis.model_set import KINDS
from merge_cli.analysis.result import Analysis
from merge_cli.report import charts
from merge_cli.report.charts import Axis, Scale, Values, text_width
from merge_cli.report.numbers import bare_percent, number, percent, two_decimals
from merge_cli.report.page import Part, Section, figure, mean, root, section
from merge_cli.report.relations import RelationsView, by_layer, pair_rows
from merge_cli.report.sections import series

_MAX_MAPS = 6  # sources with a separate heat map
_MAX_PAIRS = 10  # columns of the cosines by kind
_PAIR = 110.0  # px for the name of a pair


def kinds(analysis: Analysis, view: RelationsView) -> Section:
    """Where the changes are: kinds of modules by sources, and by layers."""
    how = (
        "‖δ‖/‖θ₀‖ by kind of module, found in the tensors' names. Light rows are modules that a "
        "fine-tune hardly touched. A layer's norms and biases are small tensors, whose changes say "
        "little about the whole."
    )
    names = [kind.name for kind in analysis.kinds]
    values = [list(kind.relative_norm or ()) for kind in analysis.kinds]
    scale = _share(values, "‖δ‖/‖θ₀‖")
    caption = "‖δ‖/‖θ₀‖ of each source, by kind of module."
    axis = charts.matrix_axis(view.labels)
    figures: list[Part | None] = [
        figure(caption, charts.heat_map(caption, names, axis, values, scale, 24, bare_percent))
    ]
    several = len(analysis.models) > 1
    if view.layers:
        figures += _maps(analysis, view)
    if several:
        figures += [_conflicts(analysis, view), _cosines(analysis, view)]
    highest = [
        (max((v, name) for v, name in zip(column, names, strict=True) if v is not None))
        for column in zip(*values, strict=True)
        if any(v is not None for v in column)
    ]
    summary = "Most changed: " + ", ".join(
        f"{name} by {label} ({percent(value)})"
        for (value, name), label in list(zip(highest, view.labels, strict=False))[:_MAX_MAPS]
    )
    return section("Where the changes are", how, f"{summary}.", *figures)


def _maps(analysis: Analysis, view: RelationsView) -> list[Part | None]:
    """A heat map for each source, all on one scale."""
    values = [cell.relative_norm or () for cell in analysis.cells]
    scale = _share(values, "‖δ‖/‖θ₀‖")
    figures: list[Part | None] = []
    for s, label in enumerate(view.labels[:_MAX_MAPS]):
        message = f"{label}: ‖δ‖/‖θ₀‖" if len(view.labels) > 1 else "‖δ‖/‖θ₀‖"
        figures.append(
            _cells(analysis, view, message, [_of_source(row, s) for row in values], scale)
        )
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
    analysis: Analysis,
    view: RelationsView,
    title: str,
    values: Sequence[float | None],
    scale: Scale,
) -> Part | None:
    """A heat map of kinds of modules by layers; `values` follow the analysis's cells."""
    if not view.layers:
        return None
    keys = [(cell.name, cell.kind) for cell in analysis.cells]
    by_cell = dict(zip(keys, values, strict=True))
    rows: dict[str, Values] = {
        kind: [by_cell.get((layer["name"], kind)) for layer in view.layers]
        for kind in KINDS
        if any(key[1] == kind for key in keys)
    }
    return by_layer(view, title, rows, scale, bare_percent)


def _cosines(analysis: Analysis, view: RelationsView) -> Part:
    """Cosines by kind of module: a column for each pair, or the mean of all where they are many."""
    by_kind = [pairs(kind.cosine) for kind in analysis.kinds]
    positions = list(dict.fromkeys((i, j) for row in by_kind for i, j, _ in row))
    names = [f"{view.labels[i]} – {view.labels[j]}" for i, j in positions]
    cells = [{(i, j): value for i, j, value in row} for row in by_kind]
    rows: list[Values] = [[row.get(position) for position in positions] for row in cells]
    ticks = [f"{i + 1} – {j + 1}" for i, j in positions]
    if len(positions) > _MAX_PAIRS:
        names = ticks = ["mean of all"]
        rows = [[mean(row)] for row in rows]
    fits = all(text_width(name) <= _PAIR for name in names)
    axis = Axis(names, names if fits else ticks, "", _PAIR + 8.0 if fits else 56.0)
    scale = Scale(root, (-1, -0.5, -0.1, 0, 0.1, 0.5, 1), number, "cosine")
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


def unchanged(view: RelationsView) -> Section:
    """Sparsity, and changes too small for a step of bfloat16."""
    total = view.total
    how = (
        "Elements whose value is exactly the base's. Of the others, those that moved by one step "
        "of bfloat16 or less: what a weight below one half may round away in a bfloat16 merge."
    )
    small = [
        f"{label} {percent(value)}"
        for label, value in zip(view.labels, total["one_step"], strict=True)
        if value is not None
    ]
    shares = [
        f"{label} {percent(value)}"
        for label, value in zip(view.labels, total["unchanged"], strict=True)
    ]
    summary = f"Unchanged: {_abbreviated(shares)}."
    if small:
        summary += f" Of the changes, one step or less: {_abbreviated(small)}."
    return section(
        "Unchanged and hardly changed",
        how,
        summary,
        series(view, "unchanged", "elements unchanged"),
    )


def largest(analysis: Analysis, view: RelationsView) -> Section:
    """Overlap of the largest changes, against chance."""
    how = (
        "The largest 1 % of each source's changes, tensor by tensor; the share of the smaller set "
        "that both sources have. Sources that change the same weights most compete for them."
    )
    total = analysis.total
    assert total is not None
    overlaps = pairs(total.overlap)
    if not overlaps:
        return section("Overlap of the largest changes", how, "Not measured.")
    chances = [v for _, _, v in pairs(total.overlap_chance)]
    i, j, share = max(overlaps, key=lambda pair: pair[2])
    chance = mean(chances) or 0.0
    summary = (
        f"Largest: {view.labels[i]} and {view.labels[j]} ({percent(share)}); independent sources "
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
    chart = charts.heat_map(caption, view.labels, axis, off_diagonal, scale, 34, bare_percent)
    return section(
        "Overlap of the largest changes",
        how,
        summary,
        figure(caption, chart),
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
    rows = [_short_name(spectrum.name) for spectrum in analysis.spectra]
    shares = [
        [
            None if r is None else r / min(spectrum.rows, spectrum.columns)
            for r in spectrum.effective_rank
        ]
        for spectrum in analysis.spectra
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
    return section(
        "How many directions", how, f"Mean: {_abbreviated(averages)}.", figure(caption, chart)
    )


def weights(analysis: Analysis, view: RelationsView) -> Section:
    """Distances between models, where there is no base."""
    how = (
        "‖θᵢ − θⱼ‖ over the geometric mean of the two norms. Without the base that the models "
        "came from, changes, signs and conflicts cannot be told from what they inherited."
    )
    total = analysis.total
    assert total is not None
    i, j, distance = max(pairs(total.distance), key=lambda pair: pair[2])
    axis: Axis = charts.matrix_axis(view.labels)
    scale = _share(total.distance, "of the norm")
    caption = "Distance between the models, whole model."
    chart = charts.heat_map(caption, view.labels, axis, total.distance, scale, 34, bare_percent)
    rows = pair_rows(view, "distance")
    return section(
        "How far the models are from one another",
        how,
        f"Farthest: {view.labels[i]} and {view.labels[j]} ({percent(distance)}).",
        figure(caption, chart),
        by_layer(
            view,
            "Distance between the models",
            rows,
            _share(rows.values(), "of the norm"),
            bare_percent,
        ),
    )


def _share(rows: Iterable[Iterable[float | None]], unit: str) -> Scale:
    """A scale from 0 to the largest value, by the root, so that small values are visible."""
    present = [v for row in rows for v in row if v is not None]
    top = max(present, default=0.0) or 1.0
    return Scale(lambda v: root(v / top), (0, top / 4, top), percent, unit)


def _of_source(row: Sequence[float | None] | None, source: int) -> float | None:
    return None if row is None else row[source]


def _short_name(name: str) -> str:
    """A tensor's name without its common prefix and suffix."""
    short = name.removesuffix(".weight").removeprefix("model.").removeprefix("language_model.")
    return charts.shorten(short, 34)


def _abbreviated(parts: Sequence[str]) -> str:
    remaining = len(parts) - charts.MAX_LINES
    return ", ".join(parts) if remaining <= 0 else f"{', '.join(parts[:6])} and {remaining} more"
