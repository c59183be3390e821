"""merge_report.html: merge_report.json as one page to read, with nothing to load.

`render_html` says what stands on it; sections.py explains the statistics, charts.py draws,
page.py and templates/page.html lay out, page.css styles.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from merge_cli.planning.preparation import preparations
from merge_cli.report import charts
from merge_cli.report.numbers import count, duration, percent, short, size, three_decimals
from merge_cli.report.page import (
    MAX_ROWS,
    Details,
    KeyFigure,
    Page,
    Paragraph,
    Section,
    Table,
    Verbatim,
    code,
    figure,
    hash,
    items,
    listing,
    or_dash,
    render,
    section,
)
from merge_cli.report.relations import Json, RelationsView, pairs_of, view_of
from merge_cli.report.sections import alike, conflict, conflict_of, groups, kept, sizes
from merge_cli.report.stages import stage_sections

_NO_STATISTICS = "No statistics were measured: there are no norms, cosines or signs to show."


def render_html(report: Json) -> str:
    """The page of a report with the content of merge_report.json (docs/report.md)."""
    view = view_of(report["statistics"])
    if view is None:
        relations = [section("How the sources relate", "", _NO_STATISTICS)]
    else:
        trimming = kept(view)
        relations = [alike(view), conflict(view), sizes(view)]
        relations += [trimming] if trimming else []
    sections = [
        *stage_sections(report),
        *(part for item in preparations() for part in item.report_sections(report)),
        *relations,
        _cost(report["cost"]),
        _provenance(report),
        _tensors(report["tensors"], report["statistics"]),
    ]
    return render(
        Page(
            kind="Merge report",
            title=_title(report),
            lede=_lede(report),
            made=_made(report),
            key_figures=_key_figures(report, view),
            sections=sections,
        )
    )


def _title(report: Json) -> str:
    sources = [i["model"] for i in report["inputs"] if i["role"] == "source"]
    names = [model.rstrip("/").rpartition("/")[2] or model for model in sources]
    listed = listing(names)
    if not listed or len(listed) > 90:
        listed = count(len(names), "model")
    words = {"auto": ", chosen by data", "training": ", learned", "search": ", searched"}
    how = next((word for key, word in words.items() if key in report), "")
    return f"{listed}, merged by {report['recipe']['method']}{how}"


def _lede(report: Json) -> str:
    base = next((i["model"] for i in report["inputs"] if i["role"] == "base"), None)
    sources = sum(i["role"] == "source" for i in report["inputs"])
    onto = Markup(" on the base {}").format(code(base)) if base else " without a base"
    statistics = report["statistics"]
    if base and statistics and statistics["of"] == "weights":
        merged = statistics["models"]
        if base not in merged and base.rstrip("/").rpartition("/")[2] not in merged:
            onto = Markup("; config and tokenizer of {}").format(code(base))
    about = Markup("{}{}; recipe {}, seed {}.").format(
        count(sources, "source"), onto, code(report["recipe"]["file"]), report["recipe"]["seed"]
    )
    conclusions = (item.conclusion(report) for item in preparations())
    conclusion = next(filter(None, conclusions), "")
    return Markup("{} ({})").format(conclusion, about) if conclusion else about


def _made(report: Json) -> list[str]:
    device, versions = report["device"], report["versions"]
    where = device["name"] + (f" ({device['reason']})" if device["reason"] else "")
    return [
        report["created"].replace("T", " ").replace("+00:00", " UTC"),
        f"merge-cli {report['merge_cli']}",
        f"torch {versions['torch']}, Python {versions['python']}, {versions['platform']}",
        f"{where}, {count(report['threads'], 'thread')}",
    ]


def _seconds_before(report: Json) -> float:
    """Seconds of training, searching or trying methods before the merge."""
    # `auto` first: what it has learned on the way is part of its own time.
    costs = [report[key]["cost"] for key in ("auto", "training", "search") if key in report][:1]
    return float(sum(cost.get("wall_seconds", cost["seconds"]) for cost in costs))


def _key_figures(report: Json, view: RelationsView | None) -> list[KeyFigure]:
    output, cost = report["output"], report["cost"]
    peaks = [f"{size(cost['peak_vram'])} on the GPU"] if cost["peak_vram"] else []
    before = _seconds_before(report)
    took = [f"{duration(before)} before the merge"] if before else []
    rows = [
        ("Parameters", short(output["parameters"]), ", ".join(output["dtypes"])),
        ("Size", size(output["bytes"]), count(len(output["shards"]), "file")),
        ("Time", duration(before + cost["seconds"]), *took, f"{size(cost['bytes_read'])} read"),
        ("Peak memory", size(cost["peak_rss"]), *peaks),
    ]
    if view is not None:
        pairs = [v for v, _ in pairs_of(view)]
        if pairs:
            ends = dict.fromkeys(three_decimals(end) for end in (min(pairs), max(pairs)))
            rows.append(("Cosine of sources", " to ".join(ends), view.kind))
        conflict, change = conflict_of(view), view.total["change"]
        if conflict is not None:
            rows.append(("Sign conflict", percent(conflict), "of elements"))
        if change is not None:
            rows.append(("Change from the base", percent(change), "of its norm"))
    return [KeyFigure(name, value, remarks) for name, value, *remarks in rows]


def _cost(cost: Json) -> Section:
    title = "Where the time went"
    how = (
        "Threads work side by side, so their seconds add up to more than the clock showed. "
        "Thread-seconds: time that the threads of a stage were at work."
    )
    stages = cost["stages"]
    result = duration(cost["seconds"])
    if cost["survey_seconds"]:
        result += f", after {duration(cost['survey_seconds'])} to survey the sources"
    result += f"; {size(cost['bytes_read'])} read, {size(cost['bytes_written'])} written"
    if cost["resumed_bytes"]:
        result += f", of which {size(cost['resumed_bytes'])} by the run that this one resumed"
    figures = []
    if stages:
        busy = [
            (
                name,
                s["thread_seconds"],
                f"{s['thread_seconds']:.3g} s on {count(s['threads'], 'thread')}",
            )
            for name, s in stages.items()
        ]
        rates = [
            (
                name,
                s["gigabytes_per_second"],
                or_dash(s["gigabytes_per_second"], lambda v: f"{v:.3g} GB/s"),
            )
            for name, s in stages.items()
            if s["bytes"]
        ]
        for caption, rows in (("Thread-seconds by stage.", busy), ("GB/s by stage.", rates)):
            if rows:  # a run that found everything done has moved nothing
                figures.append(figure(caption, charts.side_bars(caption, rows)))
    sizes = (("peak, resident", "peak_rss"), ("peak, GPU", "peak_vram"), ("buffers", "buffers"))
    memory = [(label, float(cost[key]), size(cost[key])) for label, key in sizes if cost[key]]
    if memory:
        chart = charts.side_bars("Memory", memory)
        figures.append(figure("Memory; the buffers are what all threads together may hold.", chart))
    return section(title, how, f"{result}.", *figures)


def _provenance(report: Json) -> Section:
    recipe = report["recipe"]
    inputs = [
        [
            i["model"],
            i["role"],
            hash(i["revision"]),
            hash(i["digest"]),
            f"{i['tensors']:,}",
            size(i["bytes"]),
        ]
        for i in report["inputs"]
    ]
    heads = ["model", "role", "revision", "fingerprint", "tensors", "size"]
    digest = Markup("Recipe {}, SHA-256 {}").format(recipe["file"], hash(recipe["digest"]))
    return section(
        "What went in",
        "The same inputs and recipe give the same bytes. Point at a digest to see it whole.",
        "",
        items(report["notes"]),
        Table(heads, inputs, right=2),
        Paragraph(digest, "how"),
        Verbatim(recipe["text"]),
    )


def _tensors(tensors: Sequence[Json], statistics: Json | None) -> Section:
    """Columns that would be empty are left out, and rows beyond what a browser bears."""
    fields = [f for f in ("note", "norm", "non_finite") if any(t[f] for t in tensors)]
    heads = ["name", "shape", "dtype", "action", *(f.replace("_", "-") for f in fields)]
    rows = [
        [
            t["name"],
            " × ".join(map(str, t["shape"])),
            t["dtype"],
            t["action"],
            *(_tensor_field(t[field]) for field in fields),
        ]
        for t in tensors[:MAX_ROWS]
    ]
    more = len(tensors) - len(rows)
    rest = [Paragraph(f"{more:,} more are in merge_report.json.")] if more else []
    how = "Where a cell has several numbers, they are in the order of the sources."
    return section(
        "All numbers",
        how,
        "",
        groups(statistics["groups"]) if statistics else None,
        Details(count(len(tensors), "tensor"), [Table(heads, rows), *rest]),
    )


def _tensor_field(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return " · ".join("–" if norm is None else f"{norm:.4g}" for norm in value)
    return str(value or "")
