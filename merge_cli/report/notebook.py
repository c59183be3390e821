"""Results in a notebook: a page in a frame of its own, which runs nothing and reaches nothing."""

from __future__ import annotations

from html import escape
from pathlib import Path

_STYLE = "width:100%;height:640px;border:1px solid #8884;border-radius:6px"


def framed(page: Path) -> str | None:
    """A page as HTML that a notebook shows in a frame; None where the page is gone."""
    try:
        text = page.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    # An empty `sandbox` allows no script, no form and no link to the notebook's own page.
    return f'<iframe sandbox="" style="{_STYLE}" srcdoc="{escape(text, quote=True)}"></iframe>'
