"""Generation after generation: ask, evaluate, tell. All depends on seed and scores alone.

Generations are synchronous: an optimizer is told of a generation when all of it is known, so that
neither the number of workers nor an interruption changes what it proposes next.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from merge_cli.evolve.evaluations import Evaluations
from merge_cli.evolve.evaluator import Job, Outcome
from merge_cli.evolve.objectives import Score, Split, Values
from merge_cli.evolve.optimizers import Optimizer
from merge_cli.evolve.space import Space, plain_values
from merge_cli.recipe.search import Search

# What an optimizer is told instead of a score, so that the order is: scores, candidates that a
# smaller share of the rows has ruled out, those that break a constraint, those that failed.
_REJECTED, _VIOLATED, _FAILED = 1e4, 1e6, 1e9


@dataclass(frozen=True)
class Candidate:
    """One genome and what it is worth.

    Attributes:
        score: on all rows of the search split; None for one that failed or was ruled out.
        share: of the rows that it was evaluated on last.
    """

    number: int
    generation: int
    genome: list[float]
    outcome: Outcome
    score: Score | None
    share: float = 1.0

    @property
    def rank_key(self) -> tuple[float, float, int]:
        """The best first; of equals the first."""
        assert self.score is not None, "candidates without a score are not ranked"
        return (*self.score.order, self.number)


def best_first(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that have a score."""
    return sorted((c for c in candidates if c.score is not None), key=lambda c: c.rank_key)


class Loop:
    """A search's generations.

    Attributes:
        candidates: all that were tried, in order.
        ended: why there are no more.
    """

    def __init__(
        self, search: Search, space: Space, split: Split, base: Values | None,
        optimizer: Optimizer, evaluations: Evaluations,
    ) -> None:  # fmt: skip
        self._search, self._space, self._split, self._base = search, space, split, base
        self._optimizer, self._evaluations = optimizer, evaluations
        self.candidates: list[Candidate] = []
        self.ended = ""

    def run(self) -> None:
        """Until the evaluations are used up, or the optimizer has converged."""
        generation = 0
        while not self.ended:
            room = self._search.evaluations - len(self.candidates)
            if room <= 0:
                self.ended = f"all {self._search.evaluations} evaluations are used"
                return
            asked = self._optimizer.ask()
            found = self._generation(generation, asked[:room])
            self.candidates += found
            if len(found) == len(asked):
                self._tell(asked, found)
                self.ended = self._optimizer.ended
            generation += 1

    def _generation(self, generation: int, genomes: list[list[float]]) -> list[Candidate]:
        first = len(self.candidates)
        alive = list(range(len(genomes)))
        last: dict[int, tuple[Outcome, float]] = {}
        for share in (*self._search.fidelity, 1.0):
            jobs = [Job(first + i, self._space.recipe(genomes[i]), "search", share) for i in alive]
            about = [
                {"generation": generation, "genome": genomes[i],
                 "parameters": plain_values(self._space, genomes[i])}
                for i in alive
            ]  # fmt: skip
            outcomes = self._evaluations.of("candidate", jobs, about)
            for i, outcome in zip(alive, outcomes, strict=True):
                last[i] = outcome, share
            if share < 1.0:
                kept = math.ceil(self._search.keep * len(alive))
                fine = [i for i in alive if not last[i][0].error]
                alive = sorted(fine, key=lambda i: (*self._score(last[i][0]).order, i))[:kept]
        return [
            Candidate(
                first + i, generation, genome, outcome,
                self._score(outcome) if share == 1.0 and not outcome.error else None, share,
            )
            for i, genome in enumerate(genomes) for outcome, share in [last[i]]
        ]  # fmt: skip

    def _score(self, outcome: Outcome) -> Score:
        return self._split.score(outcome.values, self._base)

    def _tell(self, asked: list[list[float]], found: Sequence[Candidate]) -> None:
        goals = len(self._split.weighted)
        ranks, parts = [], []
        for one in found:
            if one.outcome.error:
                ranks.append(_FAILED)
                parts.append((_FAILED,) * goals)
                continue
            score = one.score or self._score(one.outcome)
            penalty = 0.0
            if one.score is None:  # ruled out: the earlier, the worse
                stages = (*self._search.fidelity, 1.0)
                penalty += _REJECTED * (len(stages) - 1 - stages.index(one.share))
            if score.violation:
                penalty += _VIOLATED + score.violation
            ranks.append(penalty if score.violation else penalty + score.total)
            parts.append(tuple(part + penalty for part in score.parts))
        self._optimizer.tell(asked, ranks, parts)
