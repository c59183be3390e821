"""The page of `merge-cli analyze --html`: an analysis to read, with nothing to load.

It looks like merge_report.html and shares its charts and its sections on likeness and conflict.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any

from merge_cli.analysis.measures import pairs
from merge_cli.analysis.result import Analysis
from merge_cli.checkpoint.raw import write_error
from merge_cli.report.analysis_files import differences, numbers
from merge_cli.report.analysis_sections import kinds, largest, ranks, unchanged, weights
from merge_cli.report.elements import document, key_figures, section
from merge_cli.report.relations import Json, View, view_of
from merge_cli.report.sections import alike, conflict, sizes
from merge_cli.report.words import cosine, count, duration, listing, percent, short, size


def render_analysis(analysis: Analysis) -> str:
    """The whole page."""
    found = analysis.to_json()
    view = view_of(_statistics(found))
    body = [_header(analysis), _key_figures(analysis), _verdicts(analysis), _advice(analysis)]
    if view is not None:
        body += _relations(analysis, found, view)
    body += [differences(analysis), numbers(analysis)]
    return document(_title(analysis), body)


def _relations(analysis: Analysis, found: Json, view: View) -> list[str]:
    if analysis.base is None:
        return [alike(view), weights(analysis, view)]
    several = len(analysis.models) > 1
    return [
        sizes(view),
        kinds(analysis, view),
        *([alike(view), conflict(view), largest(analysis, view)] if several else []),
        unchanged(view),
        ranks(analysis, view),
    ]


def _statistics(found: Json) -> dict[str, Any] | None:
    """The measures as the report's sections know them: an analysis has no merge in it."""
    if found["total"] is None:
        return None
    merge = {"change": None, "kept": None}
    return {
        "of": "weights" if found["base"] is None else "deltas",
        "models": found["models"],
        "sampled": 1.0,
        "total": {**found["total"], **merge},
        "groups": [{**layer, **merge} for layer in found["layers"]],
    }


def _title(analysis: Analysis) -> str:
    listed = listing(analysis.models)
    if len(listed) > 90:
        listed = count(len(analysis.models), "model")
    return f"{listed}, compared" + (f" with {analysis.base}" if analysis.base else "")


def _header(analysis: Analysis) -> str:
    against = (
        f"{count(len(analysis.models), 'source')} against the base "
        f"<code>{escape(analysis.files[0].reference)}</code>"
        if analysis.base
        else f"{count(len(analysis.models), 'model')} without a base"
    )
    made = [
        datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        f"merge-cli {version('merge-cli')}",
        f"{analysis.device}, {count(analysis.threads, 'thread')}",
        f"seed {analysis.seed}",
    ]
    return (
        f'<header>\n<p class="kind">Analysis</p>\n<h1>{escape(_title(analysis))}</h1>\n'
        f'<p class="lede">{against}: {analysis.compared:,} of {count(analysis.tensors, "tensor")} '
        "compared, from the weights alone; no model was run.</p>\n"
        f'<p class="made">{escape(" · ".join(made))}</p>\n</header>'
    )


def _key_figures(analysis: Analysis) -> str:
    total = analysis.total
    rows = []
    if total is not None:
        rows.append(("Parameters", short(total.count), "compared"))
        if total.relative_norm:
            rows.append(("Distance from the base", _ends(total.relative_norm), "of its norm"))
        cosines = [value for _, _, value in pairs(total.cosine)]
        if cosines:
            ends = dict.fromkeys(cosine(end, ".2f") for end in (min(cosines), max(cosines)))
            of = "task vectors" if analysis.base else "weights"
            rows.append(("Cosine of sources", " to ".join(ends), of))
        if total.conflict is not None:
            rows.append(("Sign conflict", percent(total.conflict), "of elements"))
        if total.unchanged:
            rows.append(("Unchanged", _ends(total.unchanged), "of elements"))
    rows.append(("Time", duration(analysis.seconds), f"{size(analysis.bytes_read)} read"))
    rows.append(("Peak memory", size(analysis.peak_memory), ""))
    return key_figures([[part for part in row if part] for row in rows])


def _ends(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return " to ".join(dict.fromkeys(percent(end) for end in (min(known), max(known))))


def _verdicts(analysis: Analysis) -> str:
    how = (
        "What the numbers look like, each with the threshold it was compared with. The thresholds "
        "are rules of thumb: a reason to look, not a proof."
    )
    items = [
        f'<li>{escape(one.text)} <span class="soft">({escape(one.threshold)})</span></li>'
        for one in analysis.verdicts
    ]
    problems = "".join(f"<li><code>{escape(line)}</code></li>" for line in analysis.problems[:200])
    more = (
        f"<details><summary>{count(len(analysis.problems), 'problem')}</summary><ul>{problems}</ul>"
        "</details>"
        if problems
        else ""
    )
    nothing = "" if items else "Nothing unusual: related models, each changed in its own way."
    return section(
        "What stands out", how, nothing, f"<ul>{''.join(items)}</ul>" if items else "", more
    )


def _advice(analysis: Analysis) -> str:
    how = (
        "Where to begin, from the numbers below. Held-out data decides: no number here says how "
        "well a merged model works. <code>--write-recipe FILE</code> writes the first suggestion."
    )
    items = [
        f"<li><strong>{escape(one.method)}</strong>: {escape(one.reason)} "
        f'<span class="soft">({escape(one.source)})</span></li>'
        for one in analysis.advice.suggestions
    ]
    settings = "".join(f"<li>{escape(line)}</li>" for line in analysis.advice.comments)
    return section(
        "What to try first", how, analysis.advice.summary,
        f"<ul>{''.join(items)}</ul>" if items else "",
        f'<p class="how">In the recipe:</p><ul>{settings}</ul>' if settings else "",
    )  # fmt: skip


def write_page(analysis: Analysis, path: Path) -> None:
    """Write the page.

    Raises:
        ResourceError: the file cannot be written.
    """
    try:
        path.write_text(render_analysis(analysis), encoding="utf-8")
    except OSError as error:
        raise write_error(error, path) from error
