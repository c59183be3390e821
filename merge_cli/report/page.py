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
NBSP = "\u00a0"  # keeps a number and its unit on one line


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


def cosine(value: float, digits: str = ".4g") -> str:
    return f"{value:{digits}}".replace("-", "−")


def three_decimals(value: float) -> str:
    return cosine(value, ".3f")


def two_decimals(value: float) -> str:
    return cosine(value, ".2f")


def percent(value: float) -> str:
    return f"{100 * value:.3g}{NBSP}%"


def bare_percent(value: float) -> str:
    """A percentage without its unit, for cells."""
    return f"{100 * value:.3g}"


def hash(fingerprint: str | None) -> str:
    """The start of a fingerprint as code, with the rest as its tooltip."""
    if not fingerprint:
        return "–"
    return Markup('<code title="{}">{}</code>').format(fingerprint, fingerprint[:12])


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def listing(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def or_dash(value: float | None, text: charts.Format) -> str:
    return "–" if value is None else text(value)


def short(number: float) -> str:
    """1234567 as 1.23 M."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{NBSP}{unit}"
    return f"{number:,}"


def size(size: float) -> str:
    """Bytes in decimal units, as disks and links count them."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:.3g}{NBSP}{name}"
    return f"{size:,} bytes"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, remaining = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {remaining} s" if remaining else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02d} min"
