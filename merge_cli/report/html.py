"""merge_report.html: merge_report.json as one page to read, with nothing to load.

`render_html` only words and lays out what the report holds; charts.py draws, page.css styles.
Sections without data say so in a line: an empty plot reads like a measurement of zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from typing import Any

from merge_cli.report import charts
from merge_cli.report.charts import Axis, Scale, Series, Values

Json = Mapping[str, Any]
_MAX_PAIR_SOURCES = 8  # 28 pairs; more rows than that are read as sources, not as pairs
_MAX_ROWS = 20_000  # of the table of tensors: a page that still opens
_NBSP = "\u00a0"  # keeps a number and its unit on one line
_NO_STATISTICS = "No statistics were measured: there are no norms, cosines or signs to show."
_NO_LAYERS = "<p>By layer there is nothing to draw: no tensor of this model belongs to a layer.</p>"


@dataclass(frozen=True)
class _View:
    """The statistics, as the sections use them.

    Attributes:
        kind: what was measured, in words: "task vectors" or "weights".
        models: full labels; `labels`: the same, short enough for a chart.
        layers, axis: the groups that are layers, in order, and their columns.
        column_name: what a column is; names the stacks of a model that has several.
        sampled: share of the elements on which signs were counted.
    """

    kind: str
    models: Sequence[str]
    labels: Sequence[str]
    total: Json
    layers: Sequence[Json]
    axis: Axis
    column_name: str
    sampled: float

    def column(self, field: str, *at: int) -> list[float | None]:
        """A field of every layer; `at` leads into lists and matrices."""
        return [_at(layer.get(field), at) for layer in self.layers]


def render_html(report: Json) -> str:
    """The page of a report with the content of merge_report.json (docs/report.md)."""
    view = _view(report["statistics"])
    style = resources.files("merge_cli.report").joinpath("page.css").read_text(encoding="utf-8")
    if view is None:
        relations = [_section("How the sources relate", "", _NO_STATISTICS)]
    else:
        relations = [_alike(view), _conflict(view), _sizes(view), _kept(view)]
    body = [
        _header(report),
        _key_figures(report, view),
        *relations,
        _cost(report["cost"]),
        _provenance(report),
        _tensors(report["tensors"], report["statistics"]),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(_title(report))}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _view(statistics: Json | None) -> _View | None:
    if statistics is None:
        return None
    found = [group for group in statistics["groups"] if group["layer"] is not None]
    stacks = list(dict.fromkeys(_stack(group) for group in found))
    layers = sorted(found, key=lambda group: (stacks.index(_stack(group)), group["layer"]))
    of_stack = f" of {', then '.join(stacks)}" if len(stacks) > 1 else ""
    names = [f"layer {g['layer']}" if len(stacks) < 2 else g["name"] for g in layers]
    models = statistics["models"]
    return _View(
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
    """Short, and numbered where a matrix needs numbers or shortening made two alike."""
    short = [charts.shorten(model) for model in models]
    if len(set(short)) == len(short) and charts.matrix_axis(short).ticks == short:
        return short
    return [f"{i}  {label}" for i, label in enumerate(short, 1)]


def _title(report: Json) -> str:
    sources = [i["model"] for i in report["inputs"] if i["role"] == "source"]
    names = [model.rstrip("/").rpartition("/")[2] or model for model in sources]
    listed = _listed(names)
    if not listed or len(listed) > 90:
        listed = _count(len(names), "model")
    return f"{listed}, merged by {report['recipe']['method']}"


def _header(report: Json) -> str:
    base = next((i["model"] for i in report["inputs"] if i["role"] == "base"), None)
    sources = sum(i["role"] == "source" for i in report["inputs"])
    device, versions = report["device"], report["versions"]
    where = device["name"] + (f" ({device['reason']})" if device["reason"] else "")
    made = [
        report["created"].replace("T", " ").replace("+00:00", " UTC"),
        f"merge-cli {report['merge_cli']}",
        f"torch {versions['torch']}, Python {versions['python']}, {versions['platform']}",
        f"{where}, {_count(report['threads'], 'thread')}",
    ]
    onto = f" on the base <code>{escape(base)}</code>" if base else " without a base"
    return (
        f'<header>\n<p class="kind">Merge report</p>\n<h1>{escape(_title(report))}</h1>\n'
        f'<p class="lede">{_count(sources, "source")}{onto}; recipe '
        f"<code>{escape(report['recipe']['file'])}</code>, seed {report['recipe']['seed']}.</p>\n"
        f'<p class="made">{escape(" · ".join(made))}</p>\n</header>'
    )


def _key_figures(report: Json, view: _View | None) -> str:
    output, cost = report["output"], report["cost"]
    peaks = [f"{_size(cost['peak_vram'])} on the GPU"] if cost["peak_vram"] else []
    rows = [
        ("Parameters", _short(output["parameters"]), ", ".join(output["dtypes"])),
        ("Size", _size(output["bytes"]), _count(len(output["shards"]), "file")),
        ("Time", _duration(cost["seconds"]), f"{_size(cost['bytes_read'])} read"),
        ("Peak memory", _size(cost["peak_rss"]), *peaks),
    ]
    if view is not None:
        pairs = [v for v, _ in _pairs(view)]
        if pairs:
            ends = dict.fromkeys(_cosine(end, ".2f") for end in (min(pairs), max(pairs)))
            rows.append(("Cosine of sources", " to ".join(ends), view.kind))
        conflict, change = _conflict_of(view), view.total["change"]
        if conflict is not None:
            rows.append(("Sign conflict", _percent(conflict), "of elements"))
        if change is not None:
            rows.append(("Change from the base", _percent(change), "of its norm"))
    cells = [
        f"<div><dt>{name}</dt>{''.join(f'<dd>{escape(value)}</dd>' for value in values)}</div>"
        for name, *values in rows
    ]
    return f'<dl class="key">{"".join(cells)}</dl>'


def _alike(view: _View) -> str:
    how = (
        "Cosine is 1 where two sources moved the same way, 0 where they have nothing in common, "
        "−1 where they pull apart. Colour deepens with the square root, so that small values show."
    )
    pairs = _pairs(view)
    if not pairs:
        return _section("How alike the sources are", "", _no_pairs(view, "Cosines"))
    scale = Scale(_root, (-1, -0.5, -0.1, 0, 0.1, 0.5, 1), _cosine, "cosine")
    (low, a), (high, b) = min(pairs), max(pairs)
    found = f"Most alike: {b} ({_three_decimals(high)}); least: {a} ({_three_decimals(low)})."
    if len(pairs) == 1:
        found = f"The cosine of {a} is {_three_decimals(low)}."
    axis = charts.matrix_axis(view.labels)
    whole = charts.heat_map(
        "Cosine, whole model", view.labels, axis, view.total["cosine"], scale, 34, _three_decimals
    )
    rows = _pair_rows(view, "cosine")
    of_many = ", mean of each source with the others" if len(rows) == len(view.models) > 3 else ""
    return _section(
        "How alike the sources are", how, found,
        _figure(f"Cosine between {view.kind}, whole model.", whole),
        _by_layer(view, f"Cosine between {view.kind}{of_many}", rows, scale, _two_decimals),
    )  # fmt: skip


def _conflict(view: _View) -> str:
    how = (
        "The share of elements that some sources raise and others lower: what a plain average "
        f"would cancel out. {len(view.models)} unrelated sources that change every element would "
        f"be in conflict on {_percent(1 - 2.0 ** (1 - len(view.models)))}."
    )
    whole = _conflict_of(view)
    if whole is None:
        return _section("Sign conflict", "", _no_pairs(view, "Signs"))
    found = f"{_percent(whole)} of elements are in conflict{_extremes(view)}."
    if view.sampled < 1:
        found += f" Counted on {_percent(view.sampled)} of the elements."
    values = view.column("conflict")
    figures = []
    if view.layers:
        bars = charts.bars("Sign conflict by layer", view.axis, values, _percent, "elements", whole)
        figures.append(_figure(f"Elements in conflict, by {view.column_name}.", bars))
    scale = Scale(lambda v: _root(2 * v - 1), (0, 0.4, 0.5, 0.6, 1), _percent, "same sign")
    axis = charts.matrix_axis(view.labels)
    agreement = view.total["sign_agreement"]
    chart = charts.heat_map(
        "Sign agreement, whole model", view.labels, axis, agreement, scale, 34, _bare_percent
    )
    figures.append(_figure("Elements of the same sign, of those that both sources change.", chart))
    return _section("Sign conflict", how, found, *figures)


def _sizes(view: _View) -> str:
    title = "How far the sources are from the base"
    how = (
        "‖δ‖/‖θ₀‖: the norm of what a source changed, over the norm of the base. A source far "
        "above the others speaks loudest in a plain average. “merged” is what the merge itself "
        "changed."
    )
    relative, change = view.total["relative_norm"], view.total["change"]
    if relative is None:
        return _section(title, "", "Not measured: this method has no base to compare with.")
    found = _each(view, relative)
    merged = "" if change is None else f"; the merge {_percent(change)}"
    figure = _series(view, "relative_norm", "‖δ‖/‖θ₀‖", view.column("change"))
    return _section(title, how, f"Whole model: {found}{merged}.", figure)


def _kept(view: _View) -> str:
    title = "What trimming kept"
    how = "The share of each source's elements that the method kept before it merged them."
    if view.total["kept"] is None:
        return _section(title, "", "This method trims nothing.")
    found = f"Whole model: {_each(view, view.total['kept'])}"
    if view.layers and _is_flat(view, "kept"):  # equal shares by design: lines upon each other
        return _section(title, how, f"{found}; the same in every layer.")
    return _section(title, how, f"{found}.", _series(view, "kept", "elements kept"))


def _is_flat(view: _View, field: str) -> bool:
    """Whether every layer has the share of the whole model, within a hundredth of it."""
    return all(
        value is None or whole is None or abs(value - whole) <= 0.01 * whole
        for i, whole in enumerate(view.total[field])
        for value in view.column(field, i)
    )


def _each(view: _View, values: Values) -> str:
    """The value of each source, or with many their ends."""
    known = [(v, label) for v, label in zip(values, view.labels, strict=True) if v is not None]
    if len(known) > charts.MAX_LINES:
        (low, least), (high, most) = min(known), max(known)
        return f"from {_percent(low)} ({least}) to {_percent(high)} ({most})"
    return ", ".join(f"{label} {_percent(value)}" for value, label in known) or "no data"


def _series(view: _View, field: str, unit: str, merged: Values | None = None) -> str:
    """One line for each source; rows of a heat map where lines would be a tangle."""
    rows = [view.column(field, i) for i in range(len(view.models))]
    if not view.layers:
        return _NO_LAYERS
    if all(value is None for row in rows for value in row):
        return ""
    what = unit[0].upper() + unit[1:]
    named: dict[str, Values] = dict(zip(view.labels, rows, strict=True))
    if len(rows) <= charts.MAX_LINES:
        caption = f"{what}, by {view.column_name}."
        series = [Series(name, row, i) for i, (name, row) in enumerate(named.items())]
        if merged is not None and any(value is not None for value in merged):
            series.append(Series("merged", merged, "merged"))
        return _figure(caption, charts.lines(caption, view.axis, series, _percent, unit))
    top = max((value for row in rows for value in row if value is not None), default=0.0) or 1.0
    scale = Scale(lambda v: v / top, (0, top / 2, top), _percent, unit)
    if merged is not None:
        named["merged"] = merged
    return _by_layer(view, what, named, scale, _bare_percent)


def _cost(cost: Json) -> str:
    title = "Where the time went"
    how = (
        "Stages run side by side, so their seconds add up to more than the clock showed. "
        "Thread-seconds: time that the threads of a stage were at work."
    )
    stages = cost["stages"]
    found = f"{_duration(cost['seconds'])} in all"
    if cost["survey_seconds"]:
        found += f", of which {_duration(cost['survey_seconds'])} to survey the sources first"
    found += f"; {_size(cost['bytes_read'])} read, {_size(cost['bytes_written'])} written"
    if cost["resumed_bytes"]:
        found += f", of which {_size(cost['resumed_bytes'])} by the run that this one resumed"
    figures = []
    if stages:
        busy = [
            (name, s["thread_seconds"],
             f"{s['thread_seconds']:.3g} s on {_count(s['threads'], 'thread')}")
            for name, s in stages.items()
        ]  # fmt: skip
        rates = [
            (name, s["gigabytes_per_second"],
             _or_dash(s["gigabytes_per_second"], lambda v: f"{v:.3g} GB/s"))
            for name, s in stages.items()
        ]  # fmt: skip
        for caption, rows in (("Thread-seconds by stage.", busy), ("GB/s by stage.", rates)):
            figures.append(_figure(caption, charts.side_bars(caption, rows)))
    sizes = (("peak, resident", "peak_rss"), ("peak, GPU", "peak_vram"), ("window", "window"))
    memory = [(label, float(cost[key]), _size(cost[key])) for label, key in sizes if cost[key]]
    if memory:
        chart = charts.side_bars("Memory", memory)
        figures.append(_figure("Memory; the window is what the merge allowed itself.", chart))
    return _section(title, how, f"{found}.", *figures)


def _provenance(report: Json) -> str:
    recipe = report["recipe"]
    notes = "".join(f"<li>{escape(note)}</li>" for note in report["notes"])
    inputs = [
        [escape(i["model"]), i["role"], _hash(i["revision"]), _hash(i["digest"]),
         f"{i['tensors']:,}", _size(i["bytes"])]
        for i in report["inputs"]
    ]  # fmt: skip
    heads = ["model", "role", "revision", "digest of headers", "tensors", "size"]
    return _section(
        "What went in",
        "The same inputs and recipe give the same bytes. Point at a digest to see it whole.",
        "",
        f"<ul>{notes}</ul>" if notes else "",
        _table(heads, inputs, right=2),
        f'<p class="how">Recipe {escape(recipe["file"])}, SHA-256 {_hash(recipe["digest"])}</p>'
        f"<pre>{escape(recipe['text'])}</pre>",
    )


def _tensors(tensors: Sequence[Json], statistics: Json | None) -> str:
    """Columns that would be empty are left out, and rows beyond what a browser bears."""
    fields = [f for f in ("note", "norm", "non_finite") if any(t[f] for t in tensors)]
    heads = ["name", "shape", "dtype", "action", *(f.replace("_", "-") for f in fields)]
    rows = [
        [escape(t["name"]), " × ".join(map(str, t["shape"])), escape(t["dtype"]), t["action"],
         *(_tensor_field(t[field]) for field in fields)]
        for t in tensors[:_MAX_ROWS]
    ]  # fmt: skip
    more = len(tensors) - len(rows)
    rest = f"<p>{more:,} more are in merge_report.json.</p>" if more else ""
    how = "Where a cell has several numbers, they are in the order of the sources."
    return _section(
        "All numbers", how, "",
        _groups(statistics["groups"]) if statistics else "",
        f"<details><summary>{_count(len(tensors), 'tensor')}</summary>"
        f"{_table(heads, rows)}{rest}</details>",
    )  # fmt: skip


def _groups(groups: Sequence[Json]) -> str:
    """What the charts show, as numbers; and the tensors outside the layers, which they do not."""
    heads = ["group", "elements", "sign conflict", "change", "‖δ‖/‖θ₀‖", "kept"]
    rows = [
        [escape(g["name"]), f"{g['count']:,}", _or_dash(g["conflict"], _percent),
         _or_dash(g["change"], _percent), _row(g["relative_norm"]), _row(g["kept"])]
        for g in groups[:_MAX_ROWS]
    ]  # fmt: skip
    title = "Layers, and the tensors outside them"
    return f"<details><summary>{title}</summary>{_table(heads, rows, right=5)}</details>"


def _row(values: Values | None) -> str:
    return " · ".join(_or_dash(value, _percent) for value in values or ()) or "–"


def _tensor_field(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return " · ".join(f"{norm:.4g}" for norm in value)
    return escape(str(value or ""))


def _no_pairs(view: _View, what: str) -> str:
    """Why there is nothing to say about pairs of sources."""
    one = len(view.models) < 2
    return "One source: there is nothing to compare it with." if one else f"{what}: not measured."


def _conflict_of(view: _View) -> float | None:
    """None too where signs were not compared (too many sources), which leaves a count of zero."""
    known: float | None = view.total["conflict"]
    return known if view.total["sign_agreement"] is not None else None


def _pairs(view: _View) -> list[tuple[float, str]]:
    """The cosine of each pair over the whole model, and the pair's name."""
    cosine, labels = view.total["cosine"] or [], view.labels
    return [
        (row[j], f"{labels[i]} and {labels[j]}")
        for i, row in enumerate(cosine)
        for j in range(i + 1, len(row))
        if row[j] is not None
    ]


def _pair_rows(view: _View, field: str) -> dict[str, Values]:
    """Rows by layer: one for each pair, or with many sources the mean of each with the others."""
    size = len(view.labels)
    rows: dict[str, Values] = {}
    if size <= _MAX_PAIR_SOURCES:
        pairs = [(i, j) for i in range(size) for j in range(i + 1, size)]
        names = [f"{view.labels[i]} – {view.labels[j]}" for i, j in pairs]
        if max(map(charts.text_width, names)) > 230:  # the numbers that the matrix explains
            names = [f"{i + 1} – {j + 1}" for i, j in pairs]
        return {name: view.column(field, *at) for name, at in zip(names, pairs, strict=True)}
    for i, label in enumerate(view.labels):
        others = [view.column(field, i, j) for j in range(size) if j != i]
        rows[label] = [_mean(values) for values in zip(*others, strict=True)]
    return rows


def _extremes(view: _View) -> str:
    """Which layers have most and least conflict, as the end of a sentence."""
    values = view.column("conflict")
    known = [(v, name) for v, name in zip(values, view.axis.names, strict=True) if v is not None]
    if len(known) < 2:
        return ""
    (low, least), (high, most) = min(known), max(known)
    return f", from {_percent(low)} ({least}) to {_percent(high)} ({most})"


def _by_layer(
    view: _View, what: str, rows: Mapping[str, Values], scale: Scale, text: charts.Format
) -> str:
    """A heat map with a column for each layer."""
    if not view.layers:
        return _NO_LAYERS
    caption = f"{what}, by {view.column_name}."
    chart = charts.heat_map(caption, list(rows), view.axis, list(rows.values()), scale, 22, text)
    return _figure(caption, chart)


def _section(title: str, how: str, found: str, *parts: str) -> str:
    """A heading with how to read it, what was found, and the figures."""
    text = f'<p class="found">{escape(found)}</p>\n' if found else ""
    reading = f'<p class="how">{how}</p>' if how else ""
    inner = "\n".join(part for part in parts if part)
    figures = f'<div class="figures">\n{inner}\n</div>\n' if inner else ""
    return (
        f"<section>\n<div><h2>{title}</h2>{reading}</div>\n<div>{text}{figures}</div>\n</section>"
    )


def _figure(caption: str, chart: str) -> str:
    head = f"<figcaption>{escape(caption)}</figcaption>"
    return f'<figure>{head}<div class="scroll">{chart}</div></figure>'


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], right: int = 0) -> str:
    """Cells are HTML already; the last `right` columns are numbers."""
    first = len(heads) - right

    def row(tag: str, cells: Sequence[str]) -> str:
        return "".join(
            f'<{tag} class="r">{cell}</{tag}>' if i >= first else f"<{tag}>{cell}</{tag}>"
            for i, cell in enumerate(cells)
        )

    body = "\n".join(f"<tr>{row('td', cells)}</tr>" for cells in rows)
    return (
        f'<div class="scroll"><table><thead><tr>{row("th", heads)}</tr></thead>'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def _at(value: Any, path: Sequence[int]) -> float | None:
    for step in path:
        value = None if value is None else value[step]
    return None if value is None else float(value)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _root(value: float) -> float:
    return math.copysign(math.sqrt(abs(value)), value)


def _cosine(value: float, digits: str = ".4g") -> str:
    return f"{value:{digits}}".replace("-", "−")


def _three_decimals(value: float) -> str:
    return _cosine(value, ".3f")


def _two_decimals(value: float) -> str:
    return _cosine(value, ".2f")


def _percent(value: float) -> str:
    return f"{100 * value:.3g}{_NBSP}%"


def _bare_percent(value: float) -> str:
    """For cells, where the legend has the unit."""
    return f"{100 * value:.3g}"


def _hash(digest: str | None) -> str:
    full = escape(digest or "")
    return f'<code title="{full}">{full[:12]}</code>' if full else "–"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def _or_dash(value: float | None, text: charts.Format) -> str:
    return "–" if value is None else text(value)


def _short(number: float) -> str:
    """1234567 as 1.23 M."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{_NBSP}{unit}"
    return f"{number:,}"


def _size(size: float) -> str:
    """Bytes in decimal units, as disks and links count them."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:.3g}{_NBSP}{name}"
    return f"{size:,} bytes"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
