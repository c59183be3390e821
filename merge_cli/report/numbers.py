"""Numbers, counts, sizes and durations as text, with a minus sign that is one."""

from __future__ import annotations

NBSP = "\u00a0"  # keeps a number and its unit on one line


def number(value: float, digits: str = ".4g") -> str:
    """Four digits; a zero has no sign."""
    return f"{value + 0.0:{digits}}".replace("-", "−")


def three_digits(value: float) -> str:
    return number(value, ".3g")


def three_decimals(value: float) -> str:
    return number(value, ".3f")


def two_decimals(value: float) -> str:
    return number(value, ".2f")


def percent(value: float) -> str:
    return f"{100 * value:.3g}{NBSP}%"


def bare_percent(value: float) -> str:
    """A percentage without its unit, for cells."""
    return f"{100 * value:.3g}"


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


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
