"""Plots with intervals: values side by side, and quality against cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from merge_cli.report.charts import Format, caption, svg, text_width, tick_step, titled

_MARK = "M-4.2 0a4.2 4.2 0 1 0 8.4 0a4.2 4.2 0 1 0-8.4 0z"


_PLOT_WIDTH = 330  # px of a plot without its labels


_ROW_HEIGHT = 22


@dataclass(frozen=True)
class Dot:
    """One model: its value, its interval (None: a single example), its style (page.css)."""

    name: str
    value: float
    ends: tuple[float, float] | None
    style: str


@dataclass(frozen=True)
class Point:
    """One merge: seconds, quality with its interval, whether it is on the front."""

    name: str
    x: float
    y: float
    ends: tuple[float, float] | None
    style: str
    on_front: bool


def dots(title: str, rows: Sequence[Dot], text: Format, unit: str) -> str:
    """A row for each model: its value as a dot, its interval as a line."""
    left = round(max(text_width(row.name) for row in rows)) + 14
    values = [v for row in rows for v in (row.value, *(row.ends or ()))]
    ticks = _ticks(min(values), max(values))
    top, bottom = 6, 6 + _ROW_HEIGHT * len(rows)

    def x_at(value: float) -> float:
        return left + (value - ticks[0]) / (ticks[-1] - ticks[0]) * _PLOT_WIDTH

    parts = [f'<path class="grid" d="M{x_at(t):.1f} {top}V{bottom}"/>' for t in ticks]
    parts += [caption(x_at(t), bottom + 17, text(t), "m num") for t in ticks]
    for i, row in enumerate(rows):
        y = top + (i + 0.5) * _ROW_HEIGHT
        parts.append(caption(left - 10, y + 4, row.name, "e"))
        tooltip = f"{row.name}: {text(row.value)}"
        if row.ends is not None:
            low, high = row.ends
            parts.append(f'<path class="whisker" d="M{x_at(low):.1f} {y:.1f}H{x_at(high):.1f}"/>')
            tooltip += f" (95 % from {text(low)} to {text(high)})"
        parts.append(_mark(x_at(row.value), y, row.style, tooltip))
    parts.append(caption(left, bottom + 36, unit, ""))
    return svg(title, left + _PLOT_WIDTH + 26, bottom + 46, parts)


def plane(
    title: str,
    points: Sequence[Point],
    x_unit: str,
    y_unit: str,
    text: Format,
    seconds: Format,
    *,
    lower_is_better: bool,
    levels: Sequence[tuple[str, float]] = (),
) -> str:
    """Quality over cost on a logarithmic axis, with the Pareto front as a line.

    Args:
        points: `x` in seconds.
        levels: names and values of y of what costs nothing, drawn as lines.
        lower_is_better: small values of y are drawn at the top, so that better is always up.
    """
    left, top, width, height = 74, 30, 560, 300
    bottom = top + height
    low_x, high_x = _decades([point.x for point in points])
    values = [v for point in points for v in (point.y, *(point.ends or ()))]
    values += [value for _, value in levels]
    ticks = _ticks(min(values), max(values))

    def x_at(value: float) -> float:
        return left + width * math.log10(value / low_x) / math.log10(high_x / low_x)

    def y_at(value: float) -> float:
        share = (value - ticks[0]) / (ticks[-1] - ticks[0])
        return top + height * (share if lower_is_better else 1 - share)

    parts = [caption(left - 8, top - 14, y_unit, "")]
    for tick in ticks:
        parts.append(f'<path class="grid" d="M{left} {y_at(tick):.1f}h{width}"/>')
        parts.append(caption(left - 8, y_at(tick) + 4, text(tick), "e num"))
    for tick in _time_ticks(low_x, high_x):
        parts.append(f'<path class="grid" d="M{x_at(tick):.1f} {top}V{bottom}"/>')
        parts.append(caption(x_at(tick), bottom + 17, seconds(tick), "m num"))
    parts.append(caption(left, bottom + 38, x_unit, ""))
    for name, value in levels:
        line = f'<path class="level" d="M{left} {y_at(value):.1f}h{width}"><title>'
        parts.append(f"{line}{escape(f'{name}: {text(value)}')}</title></path>")
    front = sorted((p for p in points if p.on_front), key=lambda p: p.x)
    if front:
        steps = [f"M{x_at(front[0].x):.1f} {y_at(front[0].y):.1f}"]
        steps += [f"H{x_at(p.x):.1f}V{y_at(p.y):.1f}" for p in front[1:]]
        parts.append(f'<path class="front" d="{"".join(steps)}H{left + width}"/>')
    for point in points:
        parts += _whisker(x_at(point.x), point.ends, y_at)
        tooltip = f"{point.name}: {text(point.y)} in {seconds(point.x)}"
        parts.append(_mark(x_at(point.x), y_at(point.y), point.style, tooltip))
    named = [(x_at(p.x), y_at(p.y), p.name, p.on_front) for p in points]
    # A level's name begins at the left edge, above its line.
    named += [(left - 4.0, y_at(value) - 9, name, False) for name, value in levels]
    parts += _names(named, left + width)
    return svg(title, left + width + 20, bottom + 48, parts)


def _whisker(
    x: float, ends: tuple[float, float] | None, y_at: Callable[[float], float]
) -> list[str]:
    if ends is None:
        return []
    return [f'<path class="whisker" d="M{x:.1f} {y_at(ends[0]):.1f}V{y_at(ends[1]):.1f}"/>']


def _names(points: Sequence[tuple[float, float, str, bool]], right: float) -> list[str]:
    """A name next to each point, moved down where it would cover another."""
    occupied: list[tuple[float, float, float]] = []
    parts = []
    for x, y, name, bold in sorted(points, key=lambda point: point[1]):
        width = text_width(name)
        start = x + 9 if x + 9 + width < right + 16 else x - 9 - width
        line = y + 4
        while any(abs(line - o) < 13 and start < e and s < start + width for s, e, o in occupied):
            line += 3
        occupied.append((start, start + width, line))
        parts.append(caption(start, line, name, "name strong" if bold else "name"))
    return parts


def _mark(x: float, y: float, style: str, tooltip: str) -> str:
    return titled(_MARK, f"mark {style}", tooltip, f' transform="translate({x:.1f} {y:.1f})"')


def _ticks(low: float, high: float) -> list[float]:
    """Four to eight round numbers that cover the range."""
    step = tick_step((high - low) or abs(high) or 1.0)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def _decades(values: Sequence[float]) -> tuple[float, float]:
    """The range of a logarithmic axis, with a margin; at least a factor of ten."""
    low, high = min(values) / 1.5, max(values) * 1.5
    if high / low < 10:
        middle = math.sqrt(low * high)
        low, high = middle / math.sqrt(10), middle * math.sqrt(10)
    return low, high


# Times that people say: seconds up to a minute, then minutes, then hours.
_ROUND_TIMES = (
    *(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0),
    *(60.0 * minutes for minutes in (1, 3, 10, 30)),
    *(3600.0 * hours for hours in (1, 3, 10, 30, 100, 300, 1000)),
)


def _time_ticks(low: float, high: float) -> list[float]:
    """About half a decade apart; every other one of more than eight."""
    ticks = [tick for tick in _ROUND_TIMES if low <= tick <= high]
    return ticks[::2] if len(ticks) > 8 else ticks
