"""Regular expressions of somebody else's, matched in bounded time.

Python's `re` tries again and again: `(a+)+$` takes longer than the age of the universe on a line of
sixty letters. An expression of an adapter, a recipe or a task is therefore looked at first. Where
its worst case is cheap, `re` matches it. Otherwise `Automaton` does: it tries in the same order,
so that it finds the same match and the same groups, but nothing twice. Its time is the size of the
expression times the length of the text.

    compile_pattern(text)   -> Pattern: search, match, fullmatch, finditer; Unreadable says why not
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from merge_cli.automaton import Automaton, Spans, parse, worst_case
from merge_cli.guarded import Unreadable

# A list of every module of a large model, joined by `|`, has 20,000 letters.
MAX_PATTERN = 100_000
# Steps of `re`, at about ten nanoseconds each, that a match may take at worst.
_CHEAP = 1_000_000


@dataclass(frozen=True)
class Found:
    """Where an expression matches. `spans[0]` is the whole, then its groups; (-1, -1) is none."""

    text: str
    spans: Spans

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
    """An expression that may be matched against anything. Make it with `compile_pattern`."""

    def __init__(self, source: str) -> None:
        self.source = source
        self._parsed = parse(source)
        self._plain = re.compile(source)
        self._automaton: Automaton | None = None
        self._costs: dict[int, bool] = {}

    @property
    def groups(self) -> int:
        return self._plain.groups

    def search(self, text: str) -> Found | None:
        """The first place where it occurs.

        Raises:
            Unreadable: it cannot be matched in bounded time (see `Automaton`).
        """
        if self._is_cheap(text):
            return _found(self._plain.search(text))
        spans = self._slow().run(text)
        return None if spans is None else Found(text, spans)

    def match(self, text: str) -> Found | None:
        """Whether the text begins with it. Raises as `search`."""
        if self._is_cheap(text):
            return _found(self._plain.match(text))
        spans = self._slow().run(text, anchored=True)
        return None if spans is None else Found(text, spans)

    def fullmatch(self, text: str) -> Found | None:
        """Whether the text is it. Raises as `search`."""
        if self._is_cheap(text):
            return _found(self._plain.fullmatch(text))
        spans = self._slow().run(text, anchored=True, whole=True)
        return None if spans is None else Found(text, spans)

    def finditer(self, text: str) -> Iterator[Found]:
        """Every place, in order. Raises as `search`."""
        if self._is_cheap(text):
            for match in self._plain.finditer(text):
                found = _found(match)
                assert found is not None
                yield found
            return
        at, forbidden = 0, -1
        while (spans := self._slow().run(text, at, forbidden=forbidden)) is not None:
            yield Found(text, spans)
            at = spans[0][1]
            forbidden = at  # an empty match may follow a match, but not be where it ended twice
            if spans[0][0] != at:
                forbidden = -1

    def _is_cheap(self, text: str) -> bool:
        size = len(text).bit_length()
        if size not in self._costs:
            self._costs[size] = worst_case(self._parsed, 2**size) <= _CHEAP
        return self._costs[size]

    def _slow(self) -> Automaton:
        if self._automaton is None:
            self._automaton = Automaton(self._parsed)
        return self._automaton


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
            return Pattern(source)
    except re.error as error:
        at = "" if error.pos is None else f", at character {error.pos + 1}"
        raise Unreadable(f"is not a regular expression: {error.msg}{at}") from None
    except (OverflowError, RecursionError, ValueError) as error:
        raise Unreadable(f"is not a regular expression: {_sentence(error)}") from None


def _sentence(error: Exception) -> str:
    return "it nests too deep" if isinstance(error, RecursionError) else str(error)


def _found(match: re.Match[str] | None) -> Found | None:
    if match is None:
        return None
    spans: Any = tuple(match.span(group) for group in range(match.re.groups + 1))
    return Found(match.string, spans)
