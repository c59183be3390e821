"""Plots of scores: values with their intervals, and quality against cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from merge_cli.report.charts import Format
from merge_cli.report.svg import caption, svg, text_width, titled

_MARK = "M-4.2 0a4.2 4.2 0 1 0 8.4 0a4.2 4.2 0 1 0-8.4 0z"
_WIDE = 330  # px of a plot's own area beside its labels
_ROW = 22


@dataclass(frozen=True)
class Dot:
    """One model: its value, the ends of its interval (None: certain), its style (page.css)."""

    name: str
    value: float
    ends: tuple[float, float] | None
    style: str


@dataclass(frozen=True)
class Point:
    """One merge in the plane: seconds, quality with its interval, whether on the front."""

    name: str
    x: float
    y: float
    ends: tuple[float, float] | None
    style: str
    on_front: bool


def dots(title: str, rows: Sequence[Dot], text: Format, unit: str) -> str:
    """A row for each model: its value as a dot, its interval as a line."""
    left = round(max(text_width(row.name) for row in rows)) + 14
    found = [v for row in rows for v in (row.value, *(row.ends or ()))]
    ticks = _ticks(min(found), max(found))
    top, bottom = 6, 6 + _ROW * len(rows)

    def at(value: float) -> float:
        return left + (value - ticks[0]) / (ticks[-1] - ticks[0]) * _WIDE

    parts = [f'<path class="grid" d="M{at(t):.1f} {top}V{bottom}"/>' for t in ticks]
    parts += [caption(at(t), bottom + 17, text(t), "m num") for t in ticks]
    for i, row in enumerate(rows):
        y = top + (i + 0.5) * _ROW
        parts.append(caption(left - 10, y + 4, row.name, "e"))
        said = f"{row.name}: {text(row.value)}"
        if row.ends is not None:
            low, high = row.ends
            parts.append(f'<path class="whisker" d="M{at(low):.1f} {y:.1f}H{at(high):.1f}"/>')
            said += f" (95 % from {text(low)} to {text(high)})"
        parts.append(_mark(at(row.value), y, row.style, said))
    parts.append(caption(left, bottom + 36, unit, ""))
    return svg(title, left + _WIDE + 26, bottom + 46, parts)


def plane(
    title: str,
    points: Sequence[Point],
    x_unit: str,
    y_unit: str,
    text: Format,
    seconds: Format,
    *,
    low_is_good: bool,
) -> str:
    """Quality over cost on a logarithmic axis; the front is the line that nothing is better than.

    Args:
        low_is_good: small values of y are drawn at the top, so that better is always up.
    """
    left, top, wide, high = 74, 30, 560, 300
    bottom = top + high
    low_x, high_x = _decades([point.x for point in points])
    found = [v for point in points for v in (point.y, *(point.ends or ()))]
    ticks = _ticks(min(found), max(found))

    def x_at(value: float) -> float:
        return left + wide * math.log10(value / low_x) / math.log10(high_x / low_x)

    def y_at(value: float) -> float:
        share = (value - ticks[0]) / (ticks[-1] - ticks[0])
        return top + high * (share if low_is_good else 1 - share)

    parts = [caption(left - 8, top - 14, y_unit, "")]
    for tick in ticks:
        parts.append(f'<path class="grid" d="M{left} {y_at(tick):.1f}h{wide}"/>')
        parts.append(caption(left - 8, y_at(tick) + 4, text(tick), "e num"))
    for tick in _log_ticks(low_x, high_x):
        parts.append(f'<path class="grid" d="M{x_at(tick):.1f} {top}V{bottom}"/>')
        parts.append(caption(x_at(tick), bottom + 17, seconds(tick), "m num"))
    parts.append(caption(left, bottom + 38, x_unit, ""))
    front = sorted((p for p in points if p.on_front), key=lambda p: p.x)
    if front:
        steps = [f"M{x_at(front[0].x):.1f} {y_at(front[0].y):.1f}"]
        steps += [f"H{x_at(p.x):.1f}V{y_at(p.y):.1f}" for p in front[1:]]
        parts.append(f'<path class="front" d="{"".join(steps)}H{left + wide}"/>')
    for point in points:
        parts += _whisker(x_at(point.x), point.ends, y_at)
        said = f"{point.name}: {text(point.y)} in {seconds(point.x)}"
        parts.append(_mark(x_at(point.x), y_at(point.y), point.style, said))
    parts += _names([(x_at(p.x), y_at(p.y), p.name, p.on_front) for p in points], left + wide)
    return svg(title, left + wide + 20, bottom + 48, parts)


def _whisker(x: float, ends: tuple[float, float] | None, at: Callable[[float], float]) -> list[str]:
    if ends is None:
        return []
    return [f'<path class="whisker" d="M{x:.1f} {at(ends[0]):.1f}V{at(ends[1]):.1f}"/>']


def _names(points: Sequence[tuple[float, float, str, bool]], right: float) -> list[str]:
    """Beside each point, moved down where another name is in the way."""
    taken: list[tuple[float, float, float]] = []
    parts = []
    for x, y, name, strong in sorted(points, key=lambda point: point[1]):
        width = text_width(name)
        start = x + 9 if x + 9 + width < right + 16 else x - 9 - width
        line = y + 4
        while any(abs(line - o) < 13 and start < e and s < start + width for s, e, o in taken):
            line += 3
        taken.append((start, start + width, line))
        parts.append(caption(start, line, name, "name strong" if strong else "name"))
    return parts


def _mark(x: float, y: float, style: str, said: str) -> str:
    return titled(_MARK, f"mark {style}", said, f' transform="translate({x:.1f} {y:.1f})"')


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers around both ends, four to eight of them."""
    span = (high - low) or abs(high) or 1.0
    rough = span / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def _decades(values: Sequence[float]) -> tuple[float, float]:
    """Ends of a logarithmic axis, with some room; never less than a factor of ten."""
    low, high = min(values) / 1.5, max(values) * 1.5
    if high / low < 10:
        middle = math.sqrt(low * high)
        low, high = middle / math.sqrt(10), middle * math.sqrt(10)
    return low, high


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, ... ; only powers of ten where they are enough."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1.0,) if last - first > 4 else (1.0, 2.0, 5.0)
    found = [f * 10.0**power for power in range(first, last + 1) for f in factors]
    return [tick for tick in found if low <= tick <= high]
