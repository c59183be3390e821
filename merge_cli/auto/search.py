"""The search's step: which candidates are to be measured next, and which weights are the best.

Candidates of a generation may be measured in any order, by several workers at once. What is
measured is in the journal; after a stop, the same generations come again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from merge_cli.auto.checks import SEARCH
from merge_cli.auto.weights import Weights, WeightSearch, candidate_count
from merge_cli.options import OnProgress, Progress

_KIND = "candidate"  # a line of the journal


class Journal(Protocol):
    """What a search keeps of it: `AutomaticWorkspace` is one."""

    @property
    def lines(self) -> Sequence[Mapping[str, Any]]: ...

    def append(self, line: dict[str, Any]) -> None: ...


class CandidateSearch:
    """A search, and how far it is.

    Args:
        start: the weights of its first candidate.
    """

    def __init__(
        self, start: Weights, seed: int, journal: Journal, on_progress: OnProgress
    ) -> None:
        self._search, self._on_progress = WeightSearch(start, seed), on_progress
        self._journal = journal
        self._lines = {
            tuple(line["weights"]): line for line in journal.lines if line["kind"] == _KIND
        }
        self._total = candidate_count(len(start))
        self._measured: list[Weights] = []
        self._given: set[Weights] = set()
        self._advance()

    @property
    def ended(self) -> bool:
        """Whether nothing is left to measure."""
        return not self._search.generation

    @property
    def best(self) -> Weights:
        """The best weights, when it has ended."""
        return self._search.best

    def next(self) -> Weights | None:
        """A candidate to measure; None until others are measured, or when it has ended."""
        for weights in self._search.generation:
            if weights not in self._lines and weights not in self._given:
                self._given.add(weights)
                return weights
        return None

    def take(self, weights: Weights, loss: float, cost: Mapping[str, float]) -> None:
        """Note what a candidate has measured; NaN where it predicts no numbers."""
        line: dict[str, Any] = {"kind": _KIND, "step": SEARCH, "weights": list(weights)}
        line |= {"loss": loss if math.isfinite(loss) else None, **cost}
        self._journal.append(line)
        self._lines[weights] = line
        self._given.discard(weights)
        self._advance()

    def cost(self, key: str) -> float:
        """What its candidates have taken together: `seconds` or `cpu_seconds`."""
        return math.fsum(self._lines[weights].get(key, 0.0) for weights in set(self._measured))

    def _advance(self) -> None:
        """Tell the optimizer of every generation that is complete."""
        while self._search.generation and all(w in self._lines for w in self._search.generation):
            generation = self._search.generation
            self._measured += generation
            self._search.tell([_loss(self._lines[weights]) for weights in generation])
        waiting = [w for w in self._search.generation if w in self._lines]
        done = len(self._measured) + len(waiting)
        if done:
            self._on_progress(Progress("search", done, self._total, "", "candidates"))


def _loss(line: Mapping[str, Any]) -> float:
    return math.nan if line["loss"] is None else float(line["loss"])


def start_of(lines: Sequence[Mapping[str, Any]], weights: Mapping[str, Weights]) -> str:
    """The best step that has weights, of those that were measured; of equals the first.

    Args:
        weights: of each step that has some, the uniform soup first.
    """
    measured = [line for line in lines if line["loss"] is not None and line["step"] in weights]
    first = {"step": next(iter(weights))}
    return str(min(measured, key=lambda line: line["loss"], default=first)["step"])
