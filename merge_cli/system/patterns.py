"""Regular expressions from untrusted files, matched in bounded time.

Python's `re` tries again and again: `(a+)+$` takes longer than the age of the universe on a line of
sixty letters. The package `regex` reads the same language and stops when its time is over. An
expression of an adapter, a recipe or a task is matched by it alone:

    compile_pattern(text)   -> Pattern: search, match, fullmatch, finditer; Unreadable says why not
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from merge_cli.system.untrusted import Unreadable

# A list of every module of a large model, joined by `|`, has 20,000 letters.
MAX_PATTERN = 100_000
# Seconds that one expression may take in all, however often it is matched. One that means
# something needs microseconds for a name and milliseconds for a model's answer.
MAX_SECONDS = 5.0
# A match that takes less costs nothing: a search matches names millions of times.
_FREE = 0.01


@dataclass(frozen=True)
class PatternMatch:
    """Where an expression matches. `spans[0]` is the whole, then its groups; (-1, -1) is none."""

    text: str
    spans: tuple[tuple[int, int], ...]

    @property
    def start(self) -> int:
        return self.spans[0][0]

    @property
    def end(self) -> int:
        return self.spans[0][1]

    def group(self, number: int = 0) -> str | None:
        start, end = self.spans[number]
        return None if start < 0 else self.text[start:end]


class Pattern:
    """An expression that may be matched against anything. Make it with `compile_pattern`.

    Every method raises Unreadable when the expression has taken MAX_SECONDS in all.
    """

    def __init__(self, source: str, compiled: Any) -> None:
        self.source, self._compiled = source, compiled
        self._left = MAX_SECONDS

    def fresh(self) -> Pattern:
        """The same with all of its time: for a text of its own, as each answer of a model is."""
        return Pattern(self.source, self._compiled)

    @property
    def groups(self) -> int:
        count: int = self._compiled.groups
        return count

    def search(self, text: str) -> PatternMatch | None:
        """The first place where it occurs."""
        return self._timed(self._compiled.search, text)

    def match(self, text: str) -> PatternMatch | None:
        """Whether the text begins with it."""
        return self._timed(self._compiled.match, text)

    def fullmatch(self, text: str) -> PatternMatch | None:
        """Whether the text is it."""
        return self._timed(self._compiled.fullmatch, text)

    def finditer(self, text: str) -> Iterator[PatternMatch]:
        """Every match, in order."""
        matches = self._compiled.finditer(text, timeout=max(self._left, 0.001))
        while (result := self._timed(lambda _, **limit: next(matches, None), text)) is not None:
            yield result

    def _timed(self, how: Any, text: str) -> PatternMatch | None:
        began = time.monotonic()
        try:
            if self._left <= 0:
                raise TimeoutError
            match = how(text, timeout=self._left)
        except (TimeoutError, MemoryError):
            self._left = 0.0
            message = f"is an expression that takes too long to match (over {MAX_SECONDS:g} s)"
            raise Unreadable(message) from None
        spent = time.monotonic() - began
        if spent > _FREE:
            self._left -= spent
        if match is None:
            return None
        return PatternMatch(text, tuple(match.span(n) for n in range(self.groups + 1)))


@lru_cache(maxsize=4096)
def compile_pattern(source: str) -> Pattern:
    """An expression, ready to be matched.

    Raises:
        Unreadable: no regular expression, or longer than MAX_PATTERN. The text continues the
            name of what holds it: `is not a regular expression: ...`.
    """
    if len(source) > MAX_PATTERN:
        raise Unreadable(f"is an expression of {len(source)} characters (at most {MAX_PATTERN})")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of syntax that Python will read otherwise some day
            re.compile(source)  # what Python's own users may write, and nothing more
            import regex

            return Pattern(source, regex.compile(source, regex.V0))
    except re.error as error:
        at = "" if error.pos is None else f", at character {error.pos + 1}"
        raise Unreadable(f"is not a regular expression: {error.msg}{at}") from None
    except (OverflowError, RecursionError, ValueError) as error:
        raise Unreadable(f"is not a regular expression: {_sentence(error)}") from None
    except regex.error as error:
        raise Unreadable(f"is not a regular expression: {error}") from None


def _sentence(error: Exception) -> str:
    return "it nests too deep" if isinstance(error, RecursionError) else str(error)
