"""How the sources relate, by layer and pair: the statistics of a report, arranged for sections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merge_cli.report import charts
from merge_cli.report.charts import Axis, Scale, Values, text_width
from merge_cli.report.numbers import percent
from merge_cli.report.page import Figure, Paragraph, figure, mean, or_dash

Json = Mapping[str, Any]
NO_LAYERS = Paragraph("There is no chart by layer: no tensor of this model belongs to a layer.")
_MAX_PAIR_SOURCES = 8  # 28 pairs; with more sources, one row for each source


@dataclass(frozen=True)
class RelationsView:
    """The statistics of sources, arranged for the sections.

    Attributes:
        kind: what was compared: "task vectors" or "weights".
        models: full labels; `labels`: the same, short enough for a chart.
        layers, axis: the groups that are layers, in order, and their columns.
        column_name: what a column is; with the stacks' names where a model has several.
        sampled: share of the elements that were measured.
        outside: tensors outside layers, which charts leave out, the largest first.
    """

    kind: str
    models: Sequence[str]
    labels: Sequence[str]
    total: Json
    layers: Sequence[Json]
    axis: Axis
    column_name: str
    sampled: float
    outside: Sequence[Json] = ()

    @property
    def measured_on(self) -> str:
        """A sentence for what is estimated from a sample; empty where all was measured."""
        return f" Measured on {percent(self.sampled)} of the elements." if self.sampled < 1 else ""

    def column(self, field: str, *path: int) -> list[float | None]:
        """A field of every layer; `path` are indexes into lists and matrices."""
        return [_at(layer.get(field), path) for layer in self.layers]


def view_of(statistics: Json | None) -> RelationsView | None:
    if statistics is None:
        return None
    layer_groups = [group for group in statistics["groups"] if group["layer"] is not None]
    stacks = list(dict.fromkeys(_stack(group) for group in layer_groups))
    rank = {stack: i for i, stack in enumerate(stacks)}
    layers = sorted(layer_groups, key=lambda group: (rank[_stack(group)], group["layer"]))
    of_stack = f" of {', then '.join(stacks)}" if len(stacks) > 1 else ""
    names = [f"layer {g['layer']}" if len(stacks) < 2 else g["name"] for g in layers]
    models = statistics["models"]
    outside = [group for group in statistics["groups"] if group["layer"] is None]
    return RelationsView(
        outside=sorted(outside, key=lambda group: -group["count"]),
        kind="task vectors" if statistics["of"] == "deltas" else "weights",
        models=models,
        labels=_labels(models),
        total=statistics["total"],
        layers=layers,
        axis=charts.layer_axis(names, [g["layer"] for g in layers], "layer"),
        column_name=f"layer{of_stack}",
        sampled=statistics["sampled"],
    )


def _stack(group: Json) -> str:
    return str(group["name"].rpartition(".")[0])


def _labels(models: Sequence[str]) -> list[str]:
    """Short labels, numbered where a matrix needs numbers or two would be the same."""
    short = [charts.shorten(model) for model in models]
    if len(set(short)) == len(short) and charts.matrix_axis(short).ticks == short:
        return short
    return [f"{i}  {label}" for i, label in enumerate(short, 1)]


def row(values: Values | None) -> str:
    return " · ".join(or_dash(value, percent) for value in values or ()) or "–"


def pairs_of(view: RelationsView) -> list[tuple[float, str]]:
    """The cosine of each pair over the whole model, and the pair's name."""
    cosine, labels = view.total["cosine"] or [], view.labels
    return [
        (row[j], f"{labels[i]} and {labels[j]}")
        for i, row in enumerate(cosine)
        for j in range(i + 1, len(row))
        if row[j] is not None
    ]


def pair_rows(view: RelationsView, field: str) -> dict[str, Values]:
    """Rows by layer: one for each pair; with many sources each one's mean with the others."""
    size = len(view.labels)
    rows: dict[str, Values] = {}
    if size <= _MAX_PAIR_SOURCES:
        pairs = [(i, j) for i in range(size) for j in range(i + 1, size)]
        names = [f"{view.labels[i]} – {view.labels[j]}" for i, j in pairs]
        if max(map(text_width, names)) > 230:  # the numbers that the matrix explains
            names = [f"{i + 1} – {j + 1}" for i, j in pairs]
        return {name: view.column(field, *pair) for name, pair in zip(names, pairs, strict=True)}
    for i, label in enumerate(view.labels):
        others = [view.column(field, i, j) for j in range(size) if j != i]
        rows[label] = [mean(values) for values in zip(*others, strict=True)]
    return rows


def by_layer(
    view: RelationsView, title: str, rows: Mapping[str, Values], scale: Scale, text: charts.Format
) -> Figure | Paragraph:
    """A heat map with a column for each layer."""
    if not view.layers:
        return NO_LAYERS
    caption = f"{title}, by {view.column_name}."
    chart = charts.heat_map(caption, list(rows), view.axis, list(rows.values()), scale, 22, text)
    return figure(caption, chart)


def _at(value: Any, path: Sequence[int]) -> float | None:
    for step in path:
        value = None if value is None else value[step]
    return None if value is None else float(value)
