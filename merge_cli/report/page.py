"""The parts of an HTML page, as data for templates/page.html, and how its numbers are written.

Text is plain and escaped by the template. Only `Markup` is HTML: the charts, and the words that
`code`, `strong` and `soft` make from text that they have escaped.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources

from markupsafe import Markup

from merge_cli.report import charts

MAX_ROWS = 20_000  # of a table: browsers still open the page


@dataclass(frozen=True)
class Figure:
    """A chart (an SVG) with a caption."""

    caption: str
    chart: str
    kind: str = "figure"


@dataclass(frozen=True)
class Table:
    """Rows of cells; the last `right` columns are numbers."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    right: int = 0
    kind: str = "table"


@dataclass(frozen=True)
class Items:
    """A list."""

    lines: Sequence[str]
    kind: str = "items"


@dataclass(frozen=True)
class Paragraph:
    """Some text; `style` is a class of page.css."""

    text: str
    style: str = ""
    kind: str = "paragraph"


@dataclass(frozen=True)
class Verbatim:
    """The text of a file."""

    text: str
    kind: str = "verbatim"


@dataclass(frozen=True)
class Details:
    """Folded parts with a summary line."""

    summary: str
    parts: Sequence[Part]
    kind: str = "details"


Part = Figure | Table | Items | Paragraph | Verbatim | Details


@dataclass(frozen=True)
class Section:
    """A heading, how to read the section, its finding, and the parts that show it."""

    title: str
    how: str
    finding: str
    parts: Sequence[Part] = ()


@dataclass(frozen=True)
class KeyFigure:
    """One of the numbers at the top of a page, with remarks."""

    name: str
    value: str
    remarks: Sequence[str] = ()


@dataclass(frozen=True)
class Page:
    """A complete page.

    Attributes:
        kind: shown above the title: "Merge report".
        lede: one sentence under the title; `made`: time, versions and device.
    """

    kind: str
    title: str
    lede: str
    made: Sequence[str]
    key_figures: Sequence[KeyFigure]
    sections: Sequence[Section]


def section(title: str, how: str, finding: str, *parts: Part | None) -> Section:
    """A section with those parts that are not None."""
    return Section(title, how, finding, tuple(part for part in parts if part is not None))


def figure(caption: str, chart: str) -> Figure:
    """A figure with a chart: the only function that takes a string for HTML."""
    return Figure(caption, Markup(chart))


def items(lines: Iterable[str]) -> Items | None:
    """A list; None where it would be empty."""
    listed = tuple(lines)
    return Items(listed) if listed else None


def code(text: str) -> Markup:
    """A name or a value as code."""
    return Markup("<code>{}</code>").format(text)


def strong(text: str) -> Markup:
    return Markup("<strong>{}</strong>").format(text)


def soft(text: str) -> Markup:
    """Less prominent text."""
    return Markup('<span class="soft">{}</span>').format(text)


def render(page: Page) -> str:
    """The page as one HTML file that loads nothing."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("merge_cli.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    folder = resources.files("merge_cli.report")
    style, script = (
        folder.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js")
    )
    # The page's policy names this script by what it says: no other one runs.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("page.html").render(
        page=page, style=Markup(style), script=Markup(script), digest=digest
    )


def mean(values: Iterable[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None


def root(value: float) -> float:
    return math.copysign(math.sqrt(abs(value)), value)


def hash(fingerprint: str | None) -> str:
    """The start of a fingerprint as code, with the rest as its tooltip."""
    if not fingerprint:
        return "–"
    return Markup('<code title="{}">{}</code>').format(fingerprint, fingerprint[:12])


def listing(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def or_dash(value: float | None, text: charts.Format) -> str:
    return "–" if value is None else text(value)
