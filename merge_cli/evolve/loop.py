"""Generation after generation: ask, evaluate, tell. All depends on seed and scores alone.

Generations are synchronous: an optimizer is told of a generation when all of it is known, so that
neither the number of workers nor an interruption changes what it proposes next.

A search without generations: whoever is free gets a candidate at once.

No worker waits for the slowest of a generation. What is proposed then depends on what was known at
that moment, so on how fast the workers are; one worker alone gives the same search every time. The
journal says what was asked and what came of it in the order in which it happened, and the optimizer
is asked and told again in that order: a search that was killed goes on with the candidates that
were out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merge_cli.evolve.evaluator import EvaluationJob, EvaluationOutcome
from merge_cli.evolve.journal import Evaluations
from merge_cli.evolve.objectives import CandidateScore, Split, Values
from merge_cli.evolve.optimizers import Optimizer, Ranking
from merge_cli.evolve.space import Space, plain_values
from merge_cli.recipe.search import Search

# The base's values on a share of the split's rows; None where no constraint asks for them.
Base = Callable[[float], Values | None]


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
    outcome: EvaluationOutcome
    score: CandidateScore | None
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
        self,
        search: Search,
        space: Space,
        split: Split,
        base: Base,
        optimizer: Optimizer,
        evaluations: Evaluations,
    ) -> None:
        self._search, self._space, self._split, self._base = search, space, split, base
        self._optimizer, self._evaluations = optimizer, evaluations
        self._ranking = Ranking(len(split.weighted))
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
            result = self._generation(generation, asked[:room])
            self.candidates += result
            if len(result) == len(asked):
                self._tell(asked, result)
                self.ended = self._optimizer.ended
            generation += 1

    def _generation(self, generation: int, genomes: list[list[float]]) -> list[Candidate]:
        first = len(self.candidates)
        alive = list(range(len(genomes)))
        last: dict[int, tuple[EvaluationOutcome, float]] = {}
        for share in (*self._search.fidelity, 1.0):
            jobs = [
                EvaluationJob(first + i, self._space.recipe(genomes[i]), "search", share)
                for i in alive
            ]
            about = [
                {
                    "generation": generation,
                    "genome": genomes[i],
                    "parameters": plain_values(self._space, genomes[i]),
                }
                for i in alive
            ]
            outcomes = self._evaluations.of("candidate", jobs, about)
            for i, outcome in zip(alive, outcomes, strict=True):
                last[i] = outcome, share
            if share < 1.0:
                kept = math.ceil(self._search.keep * len(alive))
                fine = [i for i in alive if not last[i][0].error]
                order = {i: self._score(last[i][0], share).order for i in fine}
                alive = sorted(fine, key=lambda i: (*order[i], i))[:kept]
        return [
            Candidate(
                first + i,
                generation,
                genome,
                outcome,
                self._score(outcome, share) if share == 1.0 and not outcome.error else None,
                share,
            )
            for i, genome in enumerate(genomes)
            for outcome, share in [last[i]]
        ]

    def _score(self, outcome: EvaluationOutcome, share: float) -> CandidateScore:
        return self._split.score(outcome.values, self._base(share))

    def _tell(self, asked: list[list[float]], found: Sequence[Candidate]) -> None:
        stages = (*self._search.fidelity, 1.0)
        scores = [
            None if item.outcome.error else item.score or self._score(item.outcome, item.share)
            for item in found
        ]
        for score in scores:
            if score is not None:
                self._ranking.see(score)
        told = [
            self._ranking.failed()
            if score is None
            # Ruled out: the earlier, the worse.
            else self._ranking.of(score, len(stages) - 1 - stages.index(one.share))
            for one, score in zip(found, scores, strict=True)
        ]
        self._optimizer.tell(asked, [rank for rank, _ in told], [parts for _, parts in told])


class Asynchronous:
    """The search.

    Attributes:
        candidates: all that were tried, in the order in which they came back.
        ended: why there are no more.
    """

    def __init__(
        self,
        search: Search,
        space: Space,
        split: Split,
        base: Base,
        optimizer: Optimizer,
        evaluations: Evaluations,
    ) -> None:
        self._limit, self._space, self._split = search.evaluations, space, split
        self._base, self._optimizer, self._evaluations = base, optimizer, evaluations
        self._ranking = Ranking(len(split.weighted))
        self._population = optimizer.population
        self._genomes: list[list[float]] = []  # by number
        self._out: set[int] = set()
        self.candidates: list[Candidate] = []
        self.ended = ""

    def run(self) -> None:
        """Until the evaluations are used up, or the optimizer has converged."""
        for kind, number, genome, outcome in self._evaluations.replay():
            if kind == "asked":
                if self._ask() != (number, genome):
                    raise self._evaluations.contradicts(number)
            elif outcome is not None:
                self._take(outcome)
        for outcome in self._evaluations.stream("candidate", self._jobs()):
            self._take(outcome)
        self.ended = self._optimizer.ended or f"all {self._limit} evaluations are used"

    def _jobs(self) -> Iterator[tuple[EvaluationJob, Mapping[str, Any]]]:
        """What was out when the search was stopped, then new ones; each asked when it is taken."""
        for number in sorted(self._out):
            yield self._job(number)
        while len(self._genomes) < self._limit and not self._optimizer.ended:
            number, genome = self._ask()
            self._evaluations.asked(number, genome)
            yield self._job(number)

    def _ask(self) -> tuple[int, list[float]]:
        number, genome = len(self._genomes), self._optimizer.ask_one()
        self._genomes.append(genome)
        self._out.add(number)
        return number, genome

    def _job(self, number: int) -> tuple[EvaluationJob, Mapping[str, Any]]:
        genome = self._genomes[number]
        about = {
            "generation": number // self._population,
            "genome": genome,
            "parameters": plain_values(self._space, genome),
        }
        return EvaluationJob(number, self._space.recipe(genome)), about

    def _take(self, outcome: EvaluationOutcome) -> None:
        """Remember a candidate and tell the optimizer."""
        number = outcome.number
        self._out.discard(number)
        genome = self._genomes[number]
        score = None
        if not outcome.error:
            score = self._split.score(outcome.values, self._base(1.0))
            self._ranking.see(score)
        generation = number // self._population
        self.candidates.append(Candidate(number, generation, genome, outcome, score))
        told = self._ranking.failed() if score is None else self._ranking.of(score)
        self._optimizer.tell_one(genome, *told)
