"""The few pieces of HTML that the report page is made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources

MAX_ROWS = 20_000  # of a table: a page that still opens


def document(title: str, body: Sequence[str]) -> str:
    """A whole page that loads nothing; `title` is text, `body` HTML."""
    style = resources.files("merge_cli.report").joinpath("page.css").read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def key_figures(rows: Iterable[Sequence[str]]) -> str:
    """The numbers that a reader wants first: (name, value, what else there is to say of it)."""
    cells = []
    for name, *values in rows:
        said = "".join(f"<dd>{escape(value)}</dd>" for value in values)
        cells.append(f"<div><dt>{escape(name)}</dt>{said}</div>")
    return f'<dl class="key">{"".join(cells)}</dl>'


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
