"""The HTML page of `merge-cli analyze --html`: figures, findings, advice, tables.

It looks like merge_report.html and shares its charts and its sections on likeness and conflict.
`page_sections` has the sections with charts.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from markupsafe import Markup

from merge_cli.analysis.differences import TokenizerDifference
from merge_cli.analysis.measures import Measures, pairs
from merge_cli.analysis.page_sections import kinds, largest, ranks, unchanged, weights
from merge_cli.analysis.result import Analysis
from merge_cli.report.numbers import count, duration, number, percent, short, size
from merge_cli.report.page import (
    MAX_ROWS,
    Details,
    KeyFigure,
    Page,
    Paragraph,
    Part,
    Section,
    Table,
    code,
    hash,
    items,
    listing,
    or_dash,
    render,
    section,
    soft,
    strong,
)
from merge_cli.report.relations import Json, RelationsView, row, view_of
from merge_cli.report.sections import alike, conflict, sizes
from merge_cli.system.raw_io import write_error


def render_analysis(analysis: Analysis) -> str:
    """The complete page."""
    data = analysis.to_json()
    view = view_of(_statistics(data))
    relations = [] if view is None else _relations(analysis, view)
    return render(
        Page(
            kind="Analysis",
            title=_title(analysis),
            lede=_lede(analysis),
            made=_made(analysis),
            key_figures=_key_figures(analysis),
            sections=[
                _findings(analysis),
                _advice(analysis),
                *relations,
                differences(analysis),
                numbers(analysis),
            ],
        )
    )


def _relations(analysis: Analysis, view: RelationsView) -> list[Section]:
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


def _statistics(data: Json) -> dict[str, Any] | None:
    """The measures in the form of a merge's statistics, without those of the merged model."""
    if data["total"] is None:
        return None
    merge = {"change": None, "kept": None}
    return {
        "of": "weights" if data["base"] is None else "deltas",
        "models": data["models"],
        "sampled": 1.0,
        "total": {**data["total"], **merge},
        "groups": [{**layer, **merge} for layer in data["layers"]],
    }


def _title(analysis: Analysis) -> str:
    listed = listing(analysis.models)
    if len(listed) > 90:
        listed = count(len(analysis.models), "model")
    return f"{listed}, compared" + (f" with {analysis.base}" if analysis.base else "")


def _lede(analysis: Analysis) -> str:
    against = (
        Markup("{} against the base {}").format(
            count(len(analysis.models), "source"), code(analysis.files[0].reference)
        )
        if analysis.base
        else f"{count(len(analysis.models), 'model')} without a base"
    )
    return Markup("{}: {:,} of {} compared, from the weights alone; no model was run.").format(
        against, analysis.compared, count(analysis.tensors, "tensor")
    )


def _made(analysis: Analysis) -> list[str]:
    return [
        datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        f"merge-cli {version('merge-cli')}",
        f"{analysis.device}, {count(analysis.threads, 'thread')}",
        f"seed {analysis.seed}",
    ]


def _key_figures(analysis: Analysis) -> list[KeyFigure]:
    total = analysis.total
    rows = []
    if total is not None:
        rows.append(("Parameters", short(total.count), "compared"))
        if total.relative_norm:
            rows.append(("Distance from the base", _bounds(total.relative_norm), "of its norm"))
        cosines = [value for _, _, value in pairs(total.cosine)]
        if cosines:
            bounds = dict.fromkeys(number(bound, ".2f") for bound in (min(cosines), max(cosines)))
            of = "task vectors" if analysis.base else "weights"
            rows.append(("Cosine of sources", " to ".join(bounds), of))
        if total.conflict is not None:
            rows.append(("Sign conflict", percent(total.conflict), "of elements"))
        if total.unchanged:
            rows.append(("Unchanged", _bounds(total.unchanged), "of elements"))
    rows.append(("Time", duration(analysis.seconds), f"{size(analysis.bytes_read)} read"))
    rows.append(("Peak memory", size(analysis.peak_memory), ""))
    return [KeyFigure(name, value, [remark] if remark else []) for name, value, remark in rows]


def _bounds(values: Sequence[float | None]) -> str:
    measured = [value for value in values if value is not None]
    return " to ".join(dict.fromkeys(percent(bound) for bound in (min(measured), max(measured))))


def _findings(analysis: Analysis) -> Section:
    how = (
        "Findings, each with its threshold. The thresholds "
        "are rules of thumb: a reason to look, not a proof."
    )
    lines = [
        Markup("{} {}").format(verdict.text, soft(f"({verdict.threshold})"))
        for verdict in analysis.verdicts
    ]
    problems = items(code(line) for line in analysis.problems[:200])
    title = count(len(analysis.problems), "problem")
    nothing = "" if lines else "Nothing unusual: related models, each changed in its own way."
    return section(
        "What stands out",
        how,
        nothing,
        items(lines),
        None if problems is None else Details(title, [problems]),
    )


def _advice(analysis: Analysis) -> Section:
    how = Markup(
        "Where to begin, from the numbers below. Held-out data decides: no number here says how "
        "well a merged model works. {} writes the first suggestion."
    ).format(code("--write-recipe FILE"))
    lines = [
        Markup("{}: {} {}").format(
            strong(suggestion.method), suggestion.reason, soft(f"({suggestion.source})")
        )
        for suggestion in analysis.advice.suggestions
    ]
    settings = items(analysis.advice.comments)
    return section(
        "What to try first",
        how,
        analysis.advice.summary,
        items(lines),
        None if settings is None else Paragraph("In the recipe:", "how"),
        settings,
    )


def write_page(analysis: Analysis, path: Path) -> None:
    """Write the page.

    Raises:
        ResourceError: the file cannot be written.
    """
    try:
        path.write_text(render_analysis(analysis), encoding="utf-8")
    except OSError as error:
        raise write_error(error, path) from error


def differences(analysis: Analysis) -> Section:
    """Dtypes, config, tokenizer and chat template."""
    how = (
        "Read as data, never executed. Token numbers must mean the same tokens, or rows of the "
        "embedding are averaged that have nothing to do with one another."
    )
    first = analysis.files[0].model
    files = [
        [
            model_files.model,
            hash(model_files.revision),
            f"{model_files.tensors:,}",
            f"{model_files.parameters:,}",
            size(model_files.bytes),
            ", ".join(f"{d} ({n})" for d, n in model_files.dtypes.items()),
        ]
        for model_files in analysis.files
    ]
    parts: list[Part | None] = [
        Table(["model", "revision", "tensors", "parameters", "size", "stored as (tensors)"], files)
    ]
    if analysis.config:
        heads = ["config.json", *(file.model for file in analysis.files)]
        parts.append(
            Table(
                heads,
                [[code(model_files.key), *model_files.values] for model_files in analysis.config],
            )
        )
    else:
        parts.append(Paragraph("The configs say the same."))
    differing = [tokenizer for tokenizer in analysis.tokenizers if tokenizer.differs]
    if differing:
        heads = ["tokenizer", "tokens", "missing", "added", "renumbered", "other differences"]
        parts.append(Table(heads, [_tokenizer(tokenizer) for tokenizer in differing]))
    else:
        parts.append(Paragraph("Tokenizers and chat templates are the same."))
    parts.append(items(analysis.notes))
    summary = f"Compared with {first}: {count(len(analysis.config), 'key')} of config.json differ"
    summary += f"; {count(len(differing), 'tokenizer')} or chat templates do." if differing else "."
    return section("Files beside the weights", how, summary, *parts)


def _tokenizer(difference: TokenizerDifference) -> list[str]:
    names = " ".join(repr(token) for token in difference.examples)
    examples = [f"for example {names}"] if names else []
    return [
        difference.model,
        "–" if difference.size is None else f"{difference.size:,}",
        f"{difference.missing:,}",
        f"{difference.added:,}",
        f"{difference.renumbered:,}",
        "; ".join([*difference.in_words(), *examples]) or "–",
    ]


def numbers(analysis: Analysis) -> Section:
    """Tables of groups and tensors, folded."""
    how = "Where a cell has several numbers, they are in the order of the sources."
    groups = [*analysis.kinds, *analysis.layers]
    tensors = analysis.each[:MAX_ROWS]
    more = len(analysis.each) - len(tensors)
    truncated = [Paragraph(f"{more:,} more are in the JSON.")] if more else []
    title = "Kinds of modules, layers, and the tensors outside them"
    return section(
        "All numbers",
        how,
        "",
        Details(title, [_table(groups, analysis)]),
        Details(count(len(analysis.each), "tensor"), [_table(tensors, analysis), *truncated]),
    )


def _table(groups: list[Measures] | tuple[Measures, ...], analysis: Analysis) -> Table:
    if analysis.base is None:
        heads = ["group", "elements", "‖θ‖"]
        rows = [
            [g.name, f"{g.count:,}", " · ".join(f"{n or 0:.4g}" for n in g.norm)] for g in groups
        ]
        return Table(heads, rows, right=2)
    heads = ["group", "elements", "‖δ‖/‖θ₀‖", "unchanged", "one step", "sign conflict"]
    rows = [
        [
            g.name,
            f"{g.count:,}",
            row(g.relative_norm),
            row(g.unchanged),
            row(g.one_step),
            or_dash(g.conflict, percent),
        ]
        for g in groups
    ]
    return Table(heads, rows, right=5)
