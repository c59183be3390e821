"""Printing an analysis: tables, findings, advice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from merge_cli.console.tables import percent, print_table
from merge_cli.system.machine import show_seconds, show_size
from merge_cli.system.terminal import print_wrapped

if TYPE_CHECKING:
    from merge_cli.analysis.differences import TokenizerDifference
    from merge_cli.analysis.measures import Measures
    from merge_cli.analysis.result import Analysis

_MAX_MODELS = 6  # models with separate columns
_MAX_ROWS = 24  # rows of problems, differences or pairs; the JSON and the page have all


def print_analysis(
    out: Console, analysis: Analysis, *, layers: bool, recipe_hint: bool = True
) -> None:
    """Print an analysis.

    Args:
        layers: with a row for each layer.
        recipe_hint: say how to write the suggested recipe.
    """
    base = f" against {analysis.files[0].reference}" if analysis.base else ", without a base"
    count = len(analysis.models)
    out.print(
        f"[bold]{count} model{'s' * (count != 1)}[/bold]{escape(base)}: "
        f"{analysis.compared:,} of {analysis.tensors:,} tensors compared; "
        f"{show_size(analysis.bytes_read)} read in {show_seconds(analysis.seconds)}, "
        f"peak memory {show_size(analysis.peak_memory)}"
    )
    if analysis.total is not None:
        _models(out, analysis, analysis.total)
        _pairs(out, analysis, analysis.total)
        _groups(out, analysis, "kind of module", analysis.kinds)
        if layers:
            _groups(out, analysis, "layer", analysis.layers)
    _files(out, analysis)
    _list(out, "Cannot be merged as they are", [escape(line) for line in analysis.problems])
    _list(out, "What stands out", [escape(verdict.text) for verdict in analysis.verdicts])
    _advice(out, analysis)
    if recipe_hint and analysis.advice.recipe is not None:
        out.print("[dim]--write-recipe FILE writes the first suggestion as a recipe.[/dim]")


def _models(out: Console, analysis: Analysis, total: Measures) -> None:
    if analysis.base is None:
        rows_of_norms = zip(analysis.models, total.norm, strict=True)
        _table(out, ["model", "‖θ‖"], [(name, f"{norm or 0:.4g}") for name, norm in rows_of_norms])
        return
    ranks = [_mean_rank(analysis, s) for s in range(len(analysis.models))]
    columns = (total.relative_norm, total.base_cosine, total.unchanged, total.one_step, ranks)
    formats: list[Callable[[float], str]] = [percent, _four_decimals, percent, percent, percent]
    rows = []
    for s, name in enumerate(analysis.models):
        values = [(column or ())[s] for column in columns]
        rows.append((name, *(_or_dash(v, text) for v, text in zip(values, formats, strict=True))))
    _table(
        out,
        ["model", "‖δ‖/‖θ₀‖", "cosine with base", "unchanged", "one-step changes", "rank"],
        rows,
    )


def _pairs(out: Console, analysis: Analysis, total: Measures) -> None:
    size = range(len(analysis.models))
    pairs = [(i, j) for i in size for j in size if i < j]
    if not pairs:
        return

    def at(matrix: Sequence[Sequence[float | None]] | None, i: int, j: int) -> float | None:
        return None if matrix is None else matrix[i][j]

    hidden = len(pairs) - _MAX_ROWS
    if hidden > 0:  # show those that are most alike
        pairs.sort(key=lambda pair: -(at(total.cosine, *pair) or 0.0))
    rows = []
    for i, j in pairs[:_MAX_ROWS]:
        pair = f"{analysis.models[i]} – {analysis.models[j]}"
        inner = analysis.inner.cosine if analysis.inner else None
        equal = _or_dash(at(total.equal, i, j), percent)
        cosines = [_or_dash(at(c, i, j), _three_decimals) for c in (total.cosine, inner)]
        if analysis.base is None:
            rows.append((pair, *cosines, _or_dash(at(total.distance, i, j), percent), equal))
            continue
        agree = _or_dash(at(total.sign_agreement, i, j), percent)
        overlap = _or_dash(at(total.overlap, i, j), percent)
        chance = _or_dash(at(total.overlap_chance, i, j), percent)
        rows.append((pair, *cosines, agree, f"{overlap} ({chance})", equal))
    heads = ["pair", "cosine", "in layers"]
    heads += (
        ["distance", "equal"]
        if analysis.base is None
        else ["same sign", "largest shared (chance)", "equal"]
    )
    _table(out, heads, rows)
    if hidden > 0:
        out.print(f"[dim]{hidden} pairs that are less alike: --json or --html[/dim]")


def _groups(out: Console, analysis: Analysis, head: str, groups: Sequence[Measures]) -> None:
    if analysis.base is None:
        return
    names = [f"‖δ‖/‖θ₀‖ {name}" for name in analysis.models]
    several, is_range = len(analysis.models) > 1, len(analysis.models) > _MAX_MODELS
    rows = []
    for group in groups:
        present = [value for value in group.relative_norm or () if value is not None]
        norms = [_or_dash(value, percent) for value in group.relative_norm or ()]
        if is_range:
            norms = (
                [percent(end) for end in (min(present), max(present))] if present else ["–", "–"]
            )
        conflict = [_or_dash(group.conflict, percent)] if several else []
        rows.append((group.name, f"{group.count:,}", *norms, *conflict))
    if is_range:
        names = ["‖δ‖/‖θ₀‖ least", "most"]
    _table(out, [head, "elements", *names, *(["sign conflict"] if several else [])], rows)


def _files(out: Console, analysis: Analysis) -> None:
    lines = []
    dtypes = {item.model: " and ".join(sorted(item.dtypes)) for item in analysis.files}
    if len(set(dtypes.values())) > 1:
        lines.append("stored as " + ", ".join(f"{m}: {d}" for m, d in dtypes.items()))
    names = [file.model for file in analysis.files]
    for key in analysis.config:
        values = ", ".join(f"{n}: {v}" for n, v in zip(names, key.values, strict=True))
        lines.append(f"config.json, {key.key}: {values}")
    lines += [f"tokenizer of {t.model}: {_difference(t)}" for t in analysis.tokenizers if t.differs]
    lines += analysis.notes
    _list(out, "Files beside the weights", [escape(line) for line in lines])


def _difference(tokenizer: TokenizerDifference) -> str:
    """The differences from the reference's tokenizer, in one line."""
    counts = (
        f"{tokenizer.missing:,} tokens missing, {tokenizer.added:,} added, "
        f"{tokenizer.renumbered:,} with another number"
    )
    return "; ".join([*([counts] if tokenizer.tokens_differ else []), *tokenizer.in_words()])


def _advice(out: Console, analysis: Analysis) -> None:
    advice = analysis.advice
    out.print(f"\n[bold]What to try first[/bold]  {escape(advice.summary)}")
    for suggestion in advice.suggestions:
        print_wrapped(
            out,
            f"[bold]{suggestion.method}[/bold]: {escape(suggestion.reason)} "
            f"[dim]({escape(suggestion.source)})[/dim]",
            indent=2,
        )


def _list(out: Console, title: str, lines: Sequence[str]) -> None:
    """Lines of markup under a title; nothing without lines."""
    if not lines:
        return
    out.print(f"\n[bold]{title}[/bold]")
    for line in lines[:_MAX_ROWS]:
        print_wrapped(out, line, indent=2)
    if len(lines) > _MAX_ROWS:
        out.print(f"  [dim]{len(lines) - _MAX_ROWS} more: --json or --html[/dim]")


def _table(out: Console, heads: Sequence[str], rows: Sequence[tuple[str, ...]]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, head in enumerate(heads):
        table.add_column(head, overflow="fold", justify="right" if i else "left")
    out.print()
    print_table(out, table, rows)


def _mean_rank(analysis: Analysis, source: int) -> float | None:
    """The mean effective rank of the samples, as a share of their smaller side."""
    shares = [
        rank / min(spectrum.rows, spectrum.columns)
        for spectrum in analysis.spectra
        if (rank := spectrum.effective_rank[source]) is not None
    ]
    return sum(shares) / len(shares) if shares else None


def _or_dash(value: float | None, text: Callable[[float], str]) -> str:
    return "–" if value is None else text(value)


def _three_decimals(value: float) -> str:
    return f"{value:.3f}"


def _four_decimals(value: float) -> str:
    return f"{value:.4f}"
