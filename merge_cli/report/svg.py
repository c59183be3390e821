"""The few shapes that charts are drawn with."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from html import escape


def text_width(text: str) -> float:
    """Pixels at 12 px, on the safe side; East Asian characters are twice as wide."""
    return sum(12.0 if unicodedata.east_asian_width(char) in "WF" else 7.2 for char in text)


def svg(title: str, width: float, height: float, parts: Sequence[str]) -> str:
    """Shrinks to four fifths on narrow screens, where its text stays readable; then it scrolls."""
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
