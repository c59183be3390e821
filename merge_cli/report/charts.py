"""Charts as inline SVG: heat maps, lines and bars that need no script, font or image.

A chart is a string with its title, units and legend; colours are classes of page.css, for light and
dark. Numbers come from the caller: nothing here knows what a merge is.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

LEVELS = 20  # colours on either side of the middle: .n20 to .n1, .z0, .p1 to .p20
MAX_LINES = 6  # page.css has six colours for lines; more series become rows of a heat map
_DARK_INK_STEPS = 13  # colours on which the default ink is readable
_PLOT_WIDTH = 750  # px: fits next to row labels on a wide page, and on paper
_MARKS = (
    "M-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0z",
    "M-2.7-2.7h5.4v5.4h-5.4z",
    "M0-3.7L3.5 2.7H-3.5z",
    "M0-3.9L3.9 0L0 3.9L-3.9 0z",
    "M0 3.7L3.5-2.7H-3.5z",
    "M-1-3.5h2v2.5h2.5v2h-2.5v2.5h-2v-2.5h-2.5v-2h2.5z",
)

Values = Sequence[float | None]
Format = Callable[[float], str]


@dataclass(frozen=True)
class Scale:
    """From a value to a colour.

    Attributes:
        share: maps a value to -1..1, the ends of the palette (0..1 where nothing is negative).
        ticks: values marked on the legend, lowest first; the first and the last are its ends.
        text: formats a value.
        unit: the legend's text.
    """

    share: Callable[[float], float]
    ticks: tuple[float, ...]
    text: Format
    unit: str

    def level(self, value: float) -> int:
        return round(LEVELS * max(-1.0, min(1.0, self.share(value))))


@dataclass(frozen=True)
class Axis:
    """Columns of a chart: `names` for tooltips, `ticks` below ("" where there is no room)."""

    names: Sequence[str]
    ticks: Sequence[str]
    label: str
    step: float


@dataclass(frozen=True)
class Series:
    """One line; `style` is the number of its colour and marker, or "merged" for the dashed one."""

    name: str
    values: Values
    style: int | str


def layer_axis(names: Sequence[str], numbers: Sequence[int], label: str) -> Axis:
    """Columns for layers, with as many numbers as fit."""
    step = max(9.0, min(56.0, _PLOT_WIDTH // max(len(names), 1)))
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100, 1000) if n * step >= 22 or n == 1000)
    return Axis(names, [str(n) if n % every == 0 else "" for n in numbers], label, step)


def matrix_axis(labels: Sequence[str]) -> Axis:
    """Columns for models: their names where all fit, else the numbers of the rows."""
    step = 68.0 if len(labels) <= 6 else 44.0
    fits = all(text_width(label) <= step - 6 for label in labels)
    ticks = labels if fits else [str(i + 1) for i in range(len(labels))]
    return Axis(labels, ticks, "", step)


def shorten(text: str, most: int = 22) -> str:
    """The start and the end of a name, because versions and sizes are at either."""
    return text if len(text) <= most else f"{text[: most // 2 - 1]}…{text[-(most - most // 2) :]}"


def heat_map(
    title: str,
    rows: Sequence[str],
    axis: Axis,
    values: Sequence[Values],
    scale: Scale,
    height: int = 22,
    text: Format | None = None,
) -> str:
    """Cells coloured by value, with the number in each where it fits.

    Args:
        values: one row for each of `rows`, one value for each column of `axis`.
        text: formats numbers in cells; default: the scale's.
    """
    left = round(max(text_width(row) for row in rows)) + 12
    top = 6
    has_numbers = axis.step >= 34
    parts = [
        caption(left - 8, top + (r + 0.5) * height + 4, row, "e") for r, row in enumerate(rows)
    ]
    for r, row in enumerate(values):
        for c, value in enumerate(row):
            x, y = left + c * axis.step, top + r * height
            parts.append(
                _cell(x, y, axis.step, height, value, scale, f"{rows[r]}, {axis.names[c]}")
            )
            if has_numbers and value is not None:
                strong = "t hi" if abs(scale.level(value)) > _DARK_INK_STEPS else "t"
                number = (text or scale.text)(value)
                parts.append(caption(x + axis.step / 2, y + height / 2 + 4, number, strong))
    bottom = top + len(rows) * height
    parts.append(_x_axis(axis, left, bottom))
    key, key_width = _colour_key(scale, left, bottom + 32)
    width = max(left + axis.step * len(axis.names), left + key_width) + 8
    return svg(title, width, bottom + 58, [*parts, key])


def lines(title: str, axis: Axis, series: Sequence[Series], text: Format, unit: str) -> str:
    """Lines from zero, broken where there is no data, with a marker and a tooltip at each value."""
    present = [v for line in series for v in line.values if v is not None]
    left, top, bottom = 56, 30, 220
    limit, grid = _y_axis(max(present, default=0.0), axis, text, unit, left, top, bottom)
    parts = [grid, _x_axis(axis, left, bottom)]
    for line in series:
        points = [
            None
            if v is None
            else (left + (i + 0.5) * axis.step, bottom - v / limit * (bottom - top))
            for i, v in enumerate(line.values)
        ]
        parts.append(f'<path class="line s-{line.style}" d="{_path(points)}"/>')
        for name, value, point in zip(axis.names, line.values, points, strict=True):
            if value is not None and point is not None:
                title = f"{line.name}, {name}: {text(value)}"
                parts.append(_mark(point, line.style, title, 0.7 if axis.step < 16 else 1))
    width = max(left + axis.step * len(axis.names) + 12, 330)
    keys, end = _line_key(series, left, bottom + 44, width)
    return svg(title, width, end, [*parts, keys])


def bars(title: str, axis: Axis, values: Values, text: Format, unit: str, mean: float) -> str:
    """One bar for each column, and a dashed line at `mean`, the value of all columns."""
    left, top, bottom = 56, 30, 200
    highest = max([mean, *(v for v in values if v is not None)])
    unit = f"{unit}; dashed: whole model, {text(mean)}"
    limit, grid = _y_axis(highest, axis, text, unit, left, top, bottom)
    gap = 6 if axis.step > 24 else 2
    parts = [grid]
    for i, value in enumerate(values):
        if value is not None:
            y = bottom - value / limit * (bottom - top)
            shape = box(left + i * axis.step + gap / 2, y, axis.step - gap, bottom - y)
            parts.append(titled(shape, "bar", f"{axis.names[i]}: {text(value)}"))
    y = bottom - mean / limit * (bottom - top)
    right = left + axis.step * len(axis.names)
    parts += [f'<path class="mean" d="M{left} {y:.4g}H{right:g}"/>', _x_axis(axis, left, bottom)]
    return svg(title, max(right + 12, 330), bottom + 26, parts)


def side_bars(title: str, rows: Sequence[tuple[str, float | None, str]]) -> str:
    """Horizontal bars: (label, length, text after the bar)."""
    left = round(max(text_width(label) for label, _, _ in rows)) + 12
    longest = max((length or 0.0 for _, length, _ in rows), default=0.0) or 1.0
    parts = []
    for i, (label, length, text) in enumerate(rows):
        y, size = 6 + i * 26, (length or 0.0) / longest * 150
        parts.append(caption(left - 8, y + 14, label, "e"))
        parts.append(titled(box(left, y + 2, max(size, 1), 16), "bar", f"{label}: {text}"))
        parts.append(caption(left + size + 7, y + 14, text, "num"))
    width = left + 165 + max(text_width(text) for _, _, text in rows)
    return svg(title, width, 8 + 26 * len(rows), parts)


def _cell(
    x: float, y: float, width: float, height: float, value: float | None, scale: Scale, name: str
) -> str:
    if value is None:
        return titled(box(x, y, width - 1, height - 1), "none", f"{name}: no data")
    return titled(
        box(x, y, width - 1, height - 1),
        _colour(scale.level(value)),
        f"{name}: {scale.text(value)}",
    )


def _colour(level: int) -> str:
    return f"{'z' if level == 0 else 'p' if level > 0 else 'n'}{abs(level)}"


def _colour_key(scale: Scale, x: float, y: float) -> tuple[str, float]:
    """The legend of a heat map and its width."""
    low, high = scale.level(scale.ticks[0]), scale.level(scale.ticks[-1])
    step = 6 if low < 0 else 10
    parts = [
        f'<path class="{_colour(level)}" d="{box(x + i * step, y, step, 9)}"/>'
        for i, level in enumerate(range(low, high + 1))
    ]
    for tick in scale.ticks:
        x_tick = x + (LEVELS * scale.share(tick) - low + 0.5) * step
        parts.append(caption(x_tick, y + 22, scale.text(tick), "m num"))
    end = (high - low + 1) * step + 14
    parts.append(caption(x + end, y + 9, scale.unit, ""))
    return "".join(parts), end + text_width(scale.unit)


def _line_key(series: Sequence[Series], left: float, y: float, width: float) -> tuple[str, float]:
    """The legend of a line chart, wrapped, and where it ends."""
    parts, x = [], left
    for line in series:
        size = 34 + text_width(line.name)
        if x > left and x + size > width:
            x, y = left, y + 20
        parts.append(f'<path class="line s-{line.style}" d="M{x:.0f} {y - 4:.0f}h20"/>')
        parts.append(_mark((x + 10, y - 4), line.style, line.name))
        parts.append(caption(x + 26, y, line.name, ""))
        x += size + 10
    return "".join(parts), y + 10


def _mark(point: tuple[float, float], style: int | str, title: str, size: float = 1) -> str:
    shape = _MARKS[style] if isinstance(style, int) else _MARKS[0]
    scaled = "" if size == 1 else f"scale({size:g})"
    transform = f' transform="translate({point[0]:.1f} {point[1]:.1f}){scaled}"'
    return titled(shape, f"mark s-{style}", title, transform)


def _path(points: Sequence[tuple[float, float] | None]) -> str:
    steps = [
        ""
        if point is None
        else f"{'L' if i and points[i - 1] else 'M'}{point[0]:.1f} {point[1]:.1f}"
        for i, point in enumerate(points)
    ]
    return "".join(steps)


def _x_axis(axis: Axis, left: float, y: float) -> str:
    parts = [
        caption(left + (i + 0.5) * axis.step, y + 17, tick, "m num")
        for i, tick in enumerate(axis.ticks)
        if tick
    ]
    if axis.label:
        parts.append(caption(left - 8, y + 17, axis.label, "e num"))
    return "".join(parts)


def _y_axis(
    highest: float, axis: Axis, text: Format, unit: str, left: float, top: float, bottom: float
) -> tuple[float, str]:
    """An axis from zero to a round number, in about four steps: that number, and the grid."""
    highest = highest or 1.0
    step = tick_step(highest)
    count = math.ceil(highest / step - 1e-9)
    parts = [caption(left, top - 14, unit, "")]
    for i in range(count + 1):
        y = bottom - i / count * (bottom - top)
        parts.append(f'<path class="grid" d="M{left} {y:.1f}h{axis.step * len(axis.names):.0f}"/>')
        parts.append(caption(left - 8, y + 4, text(i * step), "e num"))
    return step * count, "".join(parts)


def tick_step(span: float) -> float:
    """A round number that divides a span into about four steps."""
    rough = span / 4
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)


def text_width(text: str) -> float:
    """Pixels at 12 px, an upper estimate; East Asian characters are wider."""
    return sum(12.0 if unicodedata.east_asian_width(char) in "WF" else 7.2 for char in text)


def svg(title: str, width: float, height: float, parts: Sequence[str]) -> str:
    """An SVG image that shrinks to 80 % on narrow screens, and then scrolls."""
    return (
        f'<svg role="img" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'style="min-width:{0.8 * width:.0f}px"><title>{escape(title)}</title>'
        f"{''.join(parts)}</svg>"
    )


def caption(x: float, y: float, text: str, style: str) -> str:
    of_class = f' class="{style}"' if style else ""
    return f'<text{of_class} x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def box(x: float, y: float, width: float, height: float) -> str:
    return f"M{x:.1f} {y:.1f}h{width:.1f}v{height:.1f}h{-width:.1f}z"


def titled(shape: str, style: str, title: str, more: str = "") -> str:
    return f'<path class="{style}" d="{shape}"{more}><title>{escape(title)}</title></path>'
