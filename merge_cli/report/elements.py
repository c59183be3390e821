"""The few pieces of HTML that the report page is made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

MAX_ROWS = 20_000  # of a table: a page that still opens


def section(title: str, how: str, found: str, *parts: str) -> str:
    """A heading with how to read it, what was found, and the figures."""
    text = f'<p class="found">{escape(found)}</p>\n' if found else ""
    reading = f'<p class="how">{how}</p>' if how else ""
    inner = "\n".join(part for part in parts if part)
    figures = f'<div class="figures">\n{inner}\n</div>\n' if inner else ""
    return (
        f"<section>\n<div><h2>{title}</h2>{reading}</div>\n<div>{text}{figures}</div>\n</section>"
    )


def figure(caption: str, chart: str) -> str:
    head = f"<figcaption>{escape(caption)}</figcaption>"
    return f'<figure>{head}<div class="scroll">{chart}</div></figure>'


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], right: int = 0) -> str:
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
