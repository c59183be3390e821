"""A search without generations: whoever is free gets a candidate at once.

No worker waits for the slowest of a generation. What is proposed then depends on what was known at
that moment, so on how fast the workers are; one worker alone gives the same search every time. The
journal says what was asked and what came of it in the order in which it happened, and the optimizer
is asked and told again in that order: a search that was killed goes on with the candidates that
were out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from merge_cli.evolve.evaluations import Evaluations
from merge_cli.evolve.evaluator import EvaluationJob, EvaluationOutcome
from merge_cli.evolve.loop import Base, Candidate
from merge_cli.evolve.objectives import Split
from merge_cli.evolve.optimizers import Optimizer
from merge_cli.evolve.ranking import Ranking
from merge_cli.evolve.space import Space, plain_values
from merge_cli.recipe.search import Search


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
