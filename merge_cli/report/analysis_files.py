"""The analysis page's tables: files beside the weights, and every number behind the charts."""

from __future__ import annotations

from merge_cli.analysis.measures import Measures
from merge_cli.analysis.result import Analysis
from merge_cli.analysis.tokenizers import TokenizerDifference
from merge_cli.report.page import (
    MAX_ROWS,
    Details,
    Paragraph,
    Part,
    Section,
    Table,
    code,
    items,
    section,
)
from merge_cli.report.relations import row
from merge_cli.report.words import count, hash, or_dash, percent, size


def differences(analysis: Analysis) -> Section:
    """Dtypes, config, tokenizer and chat template."""
    how = (
        "Read as data, never executed. Token numbers must mean the same tokens, or rows of the "
        "embedding are averaged that have nothing to do with one another."
    )
    first = analysis.files[0].model
    files = [
        [
            one.model,
            hash(one.revision),
            f"{one.tensors:,}",
            f"{one.parameters:,}",
            size(one.bytes),
            ", ".join(f"{d} ({n})" for d, n in one.dtypes.items()),
        ]
        for one in analysis.files
    ]
    parts: list[Part | None] = [
        Table(["model", "revision", "tensors", "parameters", "size", "stored as (tensors)"], files)
    ]
    if analysis.config:
        heads = ["config.json", *(one.model for one in analysis.files)]
        parts.append(Table(heads, [[code(one.key), *one.values] for one in analysis.config]))
    else:
        parts.append(Paragraph("The configs say the same."))
    told = [one for one in analysis.tokenizers if one.differs]
    if told:
        heads = ["tokenizer", "tokens", "missing", "added", "renumbered", "what else"]
        parts.append(Table(heads, [_tokenizer(one) for one in told]))
    else:
        parts.append(Paragraph("Tokenizers and chat templates are the same."))
    parts.append(items(analysis.notes))
    found = f"Compared with {first}: {count(len(analysis.config), 'key')} of config.json differ"
    found += f"; {count(len(told), 'tokenizer')} or chat templates do." if told else "."
    return section("Files beside the weights", how, found, *parts)


def _tokenizer(one: TokenizerDifference) -> list[str]:
    return [
        one.model,
        "–" if one.size is None else f"{one.size:,}",
        f"{one.missing:,}",
        f"{one.added:,}",
        f"{one.renumbered:,}",
        "; ".join(in_words(one)) or "–",
    ]


def in_words(one: TokenizerDifference) -> list[str]:
    """What differs besides the number of tokens."""
    words = [f"{name}: {change}" for name, change in one.special.items()]
    if one.rules:
        words.append("text is cut by other rules (merges, normalizer, or added tokens)")
    if one.template not in ("same", "none"):
        words.append(f"chat template {one.template}")
    if one.examples:
        words.append("for example " + " ".join(repr(token) for token in one.examples))
    return words


def numbers(analysis: Analysis) -> Section:
    """Groups and tensors as tables, folded away."""
    how = "Where a cell has several numbers, they are in the order of the sources."
    groups = [*analysis.kinds, *analysis.layers]
    tensors = analysis.each[:MAX_ROWS]
    more = len(analysis.each) - len(tensors)
    rest = [Paragraph(f"{more:,} more are in the JSON.")] if more else []
    folded = "Kinds of modules, layers, and the tensors outside them"
    return section(
        "All numbers",
        how,
        "",
        Details(folded, [_table(groups, analysis)]),
        Details(count(len(analysis.each), "tensor"), [_table(tensors, analysis), *rest]),
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
