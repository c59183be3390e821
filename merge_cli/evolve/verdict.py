"""Whether a search was worth it, in words: those of the terminal, the page and the warnings.

It imports nothing, because the terminal's panel is loaded with every command.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def verdict_in_words(search: Mapping[str, Any]) -> str:
    """The score of a search beside that of the best merge without one.

    Args:
        search: the record, with a verdict.
    """
    verdict = search["verdict"]
    gain = f"; gain {gain_in_words(verdict)}" if "difference" in verdict else ""
    return (
        f"{search['split']} score {number(verdict['score'])}, lower is better; the best without a "
        f"search is {verdict['best_static']}, {number(verdict['best_static_score'])}{gain}"
    )


def gain_in_words(verdict: Mapping[str, Any]) -> str:
    """What a search gains over the best merge without it, with its interval: `0.006 (95 % ...)`.

    Args:
        verdict: with `difference`, of scores. Lower scores are better, so a gain is a fall.
    """
    words = number(-verdict["difference"])
    if verdict["interval"]:
        low, high = verdict["interval"]
        words += f" (95 % interval {number(-high)} to {number(-low)})"
    return words


def number(value: float) -> str:
    """Four digits, and a minus sign that is one."""
    return f"{value + 0.0:.4g}".replace("-", "−")
