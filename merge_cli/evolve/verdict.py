"""Whether a search was worth it, in words: those of the terminal, the page and the warnings.

It imports next to nothing, because the terminal's panel is loaded with every command.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from merge_cli.report.numbers import number


def verdict_in_words(search: Mapping[str, Any]) -> str:
    """The score of a search beside that of the best merge without one.

    Args:
        search: the record, with a verdict.
    """
    verdict = search["verdict"]
    direction = "higher" if search.get("maximised") else "lower"
    gain = f"; gain {gain_in_words(verdict)}" if "difference" in verdict else ""
    return (
        f"{search['split']} score {shown(search, verdict['score'])}, {direction} is better; "
        f"the best without a search is {verdict['best_static']}, "
        f"{shown(search, verdict['best_static_score'])}{gain}"
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


def shown(search: Mapping[str, Any], score: float, digits: str = ".4g") -> str:
    """A score as people read it: without the minus that maximised goals count with.

    Args:
        search: the record; `maximised` says that every goal is.
    """
    return number(-score if search.get("maximised") else score, digits)
