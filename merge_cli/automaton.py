"""Regular expressions without repeated work: the slow half of `patterns.py`.

Python's own parser reads the expression, and Python's own engine decides about single characters
and positions, so that classes, flags and anchors mean what they mean everywhere. What is done here
is the search: states times positions, in the order in which `re` would try them, each once. Without
references back a failure at a state and a position is one for good. The one difference is an
expression that repeats what may be empty, as `(a?)*`: whether it matches is the same, where its
groups lie may not be.
"""

from __future__ import annotations

import importlib
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from merge_cli.guarded import Unreadable

Spans = tuple[tuple[int, int], ...]

# `re`'s parser and compiler have had these names, and the same trees, from Python 3.10 to 3.14.
_parser: Any = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")
_compiler: Any = importlib.import_module(
    "re._compiler" if sys.version_info >= (3, 11) else "sre_compile"
)

# States of an automaton: `{1,1000}` is a thousand copies.
MAX_STATES = 20_000
# Steps of one match, at about a microsecond each.
MAX_STEPS = 1_000_000

_ONE = {"LITERAL", "NOT_LITERAL", "ANY", "IN"}
_REPEATS = {"MAX_REPEAT", "MIN_REPEAT"}


@dataclass(frozen=True)
class Parsed:
    """An expression as Python's parser understands it."""

    tree: Any
    flags: int
    groups: int


def parse(source: str) -> Parsed:
    """Raises re.error, OverflowError or RecursionError, as `re.compile` does."""
    tree = _parser.parse(source)
    return Parsed(tree, tree.state.flags, tree.state.groups)


def worst_case(parsed: Parsed, length: int) -> float:
    """The steps that `re` may take on a text so long, from above; infinite where it explodes."""
    try:
        return length * _cost(parsed.tree, length)
    except RecursionError:
        return math.inf


def _cost(nodes: Any, length: int) -> float:
    """In how many ways a sequence can be gone through: those of its parts, multiplied."""
    ways = 1.0
    for code, value in nodes:
        name = str(code)
        if name in _REPEATS or name == "POSSESSIVE_REPEAT":
            least, most, body = value
            times = min(int(most), length)
            inner = _cost(body, length)
            if inner > 1 and times > 1:
                ways *= inner**times if times * math.log(inner) < 60 else math.inf
            else:
                ways *= max(times - int(least), 0) + inner
        elif name == "BRANCH":
            ways *= sum(_cost(branch, length) for branch in value[1])
        elif name == "SUBPATTERN":
            ways *= _cost(value[-1], length)
        elif name == "ATOMIC_GROUP":
            ways *= _cost(value, length)
        elif name in ("ASSERT", "ASSERT_NOT"):
            ways *= _cost(value[1], length)
        elif name == "GROUPREF_EXISTS":
            ways *= sum(_cost(branch, length) for branch in value[1:] if branch is not None)
    return ways


@dataclass
class _State:
    """What happens at a state; `next` is where it goes on, in the order of preference."""

    kind: str  # one (a character), at (a position), split, save, look, end
    next: list[int] = field(default_factory=list)
    test: Callable[[str, int], bool] | None = None
    slot: int = 0
    width: int = 0  # of a look behind
    negate: bool = False


class Automaton:
    """A parsed expression as states.

    Raises:
        Unreadable: more than MAX_STATES states, or what needs `re` itself (references back,
            conditional groups, atomic groups).
    """

    def __init__(self, parsed: Parsed) -> None:
        self._groups = parsed.groups
        self._states: list[_State] = [_State("end")]
        self._tests: dict[str, Callable[[str, int], bool]] = {}
        try:
            self._start = self._sequence(parsed.tree, 0, parsed.flags)
        except RecursionError:
            raise Unreadable("is a regular expression that nests too deep") from None

    def run(
        self, text: str, at: int = 0, *, anchored: bool = False, whole: bool = False,
        forbidden: int = -1,
    ) -> Spans | None:  # fmt: skip
        """The first match from a position on.

        Args:
            anchored: only there.
            whole: only one that ends with the text.
            forbidden: a position that an empty match there must not end at.

        Raises:
            Unreadable: more than MAX_STEPS steps.
        """
        tried: set[int] = set()
        budget = [MAX_STEPS]
        for start in range(at, at + 1 if anchored else len(text) + 1):
            found = self._from(
                self._start, text, start, None, tried, budget,
                ends=lambda end: end != forbidden and (not whole or end == len(text)),
            )  # fmt: skip
            if found is not None:
                end, slots = found[0], _slots(found[1])
                return ((start, end), *(slots.get(n, (-1, -1)) for n in range(1, self._groups)))
        return None

    def _from(
        self, state: int, text: str, at: int, saves: Any, tried: set[int], budget: list[int],
        ends: Callable[[int], bool],
    ) -> tuple[int, Any] | None:  # fmt: skip
        """Where the first path to the end comes out, and what it has saved on its way."""
        states, size = self._states, len(text) + 1
        stack: list[tuple[int, int, Any]] = [(state, at, saves)]
        while stack:
            number, position, saves = stack.pop()
            key = number * size + position
            if key in tried:
                continue
            tried.add(key)
            budget[0] -= 1
            if budget[0] < 0:
                raise Unreadable(f"takes more than {MAX_STEPS:,} steps to match")
            current = states[number]
            if current.kind == "one":
                if position < len(text) and current.test and current.test(text, position):
                    stack.append((current.next[0], position + 1, saves))
            elif current.kind == "split":
                stack.extend((following, position, saves) for following in reversed(current.next))
            elif current.kind == "save":
                stack.append((current.next[0], position, (current.slot, position, saves)))
            elif current.kind == "at":
                if current.test and current.test(text, position):
                    stack.append((current.next[0], position, saves))
            elif current.kind == "look":
                start = position - current.width
                found = start >= 0 and self._from(
                    current.slot, text, start, saves, set(), budget, lambda end: True
                )  # an expression that looks behind has one width: it ends where it should
                if bool(found) != current.negate:
                    kept = found[1] if found else saves
                    stack.append((current.next[0], position, kept))
            elif ends(position):
                return position, saves
        return None

    def _add(self, state: _State) -> int:
        if len(self._states) >= MAX_STATES:
            raise Unreadable(f"is a regular expression of more than {MAX_STATES:,} states")
        self._states.append(state)
        return len(self._states) - 1

    def _sequence(self, nodes: Any, after: int, flags: int) -> int:
        """The state at which a sequence begins that goes on with `after`."""
        for node in reversed(list(nodes)):
            after = self._node(node, after, flags)
        return after

    def _node(self, node: Any, after: int, flags: int) -> int:
        code, value = node
        name = str(code)
        if name in _ONE or name == "AT":
            kind = "at" if name == "AT" else "one"
            return self._add(_State(kind, [after], test=self._test(node, flags)))
        if name == "BRANCH":
            return self._add(
                _State("split", [self._sequence(branch, after, flags) for branch in value[1]])
            )
        if name == "SUBPATTERN":
            group, added, removed, body = value
            inner = (flags | added) & ~removed
            if group is None:
                return self._sequence(body, after, inner)
            end = self._add(_State("save", [after], slot=2 * group + 1))
            return self._add(_State("save", [self._sequence(body, end, inner)], slot=2 * group))
        if name in _REPEATS:
            least, most, body = value
            return self._repeat(least, most, body, after, flags, greedy=name == "MAX_REPEAT")
        if name in ("ASSERT", "ASSERT_NOT"):
            direction, body = value
            width = int(body.getwidth()[0]) if direction < 0 else 0
            inner_start = self._sequence(body, 0, flags)
            negate = name == "ASSERT_NOT"
            return self._add(_State("look", [after], slot=inner_start, width=width, negate=negate))
        if name == "FAILURE":
            return self._add(_State("split", []))
        what = "is a regular expression that may take too long"
        raise Unreadable(f"{what} and cannot be bounded ({name.lower().replace('_', ' ')})")

    def _repeat(
        self, least: int, most: Any, body: Any, after: int, flags: int, *, greedy: bool
    ) -> int:
        def choice(more: int, enough: int) -> list[int]:
            return [more, enough] if greedy else [enough, more]

        if most is _parser.MAXREPEAT or str(most) == "MAXREPEAT":
            loop = self._add(_State("split"))
            start = self._sequence(body, loop, flags)
            self._states[loop].next = choice(start, after)
            after = loop
        else:
            enough = after
            for _ in range(int(most) - int(least)):
                after = self._add(
                    _State("split", choice(self._sequence(body, after, flags), enough))
                )
        for _ in range(int(least)):
            after = self._sequence(body, after, flags)
        return after

    def _test(self, node: Any, flags: int) -> Callable[[str, int], bool]:
        """Python's own answer about one character or one position."""
        key = f"{node} {flags}"
        if key not in self._tests:
            state = _parser.State()
            state.flags, state.str = flags, ""
            single = _compiler.compile(_parser.SubPattern(state, [node]), flags)
            self._tests[key] = _remembered(single) if str(node[0]) != "AT" else _at(single)
        return self._tests[key]


def _remembered(single: re.Pattern[str]) -> Callable[[str, int], bool]:
    known: dict[str, bool] = {}

    def test(text: str, at: int) -> bool:
        character = text[at]
        answer = known.get(character)
        if answer is None:
            answer = known[character] = single.match(character) is not None
        return answer

    return test


def _at(single: re.Pattern[str]) -> Callable[[str, int], bool]:
    return lambda text, at: single.match(text, at) is not None


def _slots(saves: Any) -> dict[int, tuple[int, int]]:
    """The last place of every group, from the linked list of its ends and beginnings."""
    ends: dict[int, int] = {}
    found: dict[int, tuple[int, int]] = {}
    while saves is not None:
        slot, position, saves = saves
        group = slot // 2
        if slot % 2:
            ends.setdefault(group, position)
        elif group in ends:
            found.setdefault(group, (position, ends[group]))
    return found
