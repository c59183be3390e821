"""Numbers and names as the report page writes them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from markupsafe import Markup

from merge_cli.report import charts

NBSP = "\u00a0"  # keeps a number and its unit on one line


def mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


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
    """For cells, where the legend has the unit."""
    return f"{100 * value:.3g}"


def hash(digest: str | None) -> str:
    """The start of a digest as code; the whole of it where one points."""
    if not digest:
        return "–"
    return Markup('<code title="{}">{}</code>').format(digest, digest[:12])


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
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
