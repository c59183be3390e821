"""The loop of a search: ask the optimizer, evaluate, tell it the results.

`Loop` is synchronous: an optimizer gets the results of a generation when all are complete, so that
neither the number of workers nor an interruption changes what it proposes next.

`Asynchronous` has no generations: a free worker gets a candidate at once, and none waits for the
slowest. Proposals then depend on how fast workers are; one worker alone gives the same search every
time. The journal records proposals and results in their order, and the optimizer is asked and told
again in that order: a search that was killed resumes with the candidates that were being evaluated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from merge_cli.evolve.jobs import EvaluationJob, EvaluationOutcome
from merge_cli.evolve.journal import Evaluations
from merge_cli.evolve.objectives import CandidateScore, Split, Values
from merge_cli.evolve.optimizer import Optimizer
from merge_cli.evolve.ranking import Ranking
from merge_cli.evolve.space import Space, plain_values
from merge_cli.evolve.static import StaticMerge
from merge_cli.recipe.search import Search
from merge_cli.recipe.values import Scalar

_REPEATS = 200  # proposals in a row with nothing new, that end a search
# The base's values on a share of the split's rows; None where no constraint needs them.
Base = Callable[[float], Values | None]


@dataclass(frozen=True)
class Candidate:
    """One genome with its score.

    Attributes:
        score: on all rows of the search split; None if it failed or was ruled out.
        share: of the rows in its last evaluation.
        static: the merge that needs no search and that this is; None for what was proposed.
    """

    number: int
    generation: int
    genome: list[float]
    outcome: EvaluationOutcome
    score: CandidateScore | None
    share: float = 1.0
    static: StaticMerge | None = None

    @property
    def rank_key(self) -> tuple[float, float, int]:
        """Sorts the best first; of equals the first."""
        assert self.score is not None, "candidates without a score are not ranked"
        return (*self.score.order, self.number)


def best_first(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Candidates with a score, the best first."""
    return sorted((c for c in candidates if c.score is not None), key=lambda c: c.rank_key)


@dataclass
class _SearchLoop:
    """What a search works with.

    Attributes:
        scored: candidates on all rows by their values; static merges are there first.
        candidates: all that were evaluated, in the order of their results.
        ended: why the search has ended.
    """

    search: Search
    space: Space
    split: Split
    base: Base
    optimizer: Optimizer
    evaluations: Evaluations
    scored: dict[tuple[Scalar, ...], Candidate] = field(default_factory=dict)
    candidates: list[Candidate] = field(default_factory=list, init=False)
    ended: str = field(default="", init=False)

    def __post_init__(self) -> None:
        self._ranking = Ranking(len(self.split.weighted))


class Loop(_SearchLoop):
    """A search in generations."""

    def run(self) -> None:
        """Until the evaluations are used up, or the optimizer has converged."""
        generation = repeats = 0
        while not self.ended:
            remaining = self.search.evaluations - len(self.candidates)
            if remaining <= 0:
                self.ended = f"all {self.search.evaluations} evaluations are used"
                return
            proposed = self.optimizer.ask()
            # What has the values of an earlier candidate (whole numbers, words) is not evaluated
            # again; the optimizer learns its score, and it does not count.
            values = [tuple(self.space.values(genome)) for genome in proposed]
            new = [i for i, v in enumerate(values) if v not in self.scored and values.index(v) == i]
            candidates = self._generation(generation, [proposed[i] for i in new[:remaining]])
            self.candidates += candidates
            evaluated = dict(zip((values[i] for i in new), candidates, strict=False))
            if len(candidates) == len(new):
                self._tell(proposed, [self.scored.get(v) or evaluated[v] for v in values])
                self.ended = self.optimizer.ended
            self.scored |= {v: item for v, item in evaluated.items() if item.share == 1.0}
            repeats = 0 if new else repeats + len(proposed)
            if repeats >= _REPEATS and not self.ended:
                self.ended = f"{repeats} proposals in a row had been evaluated before"
            generation += 1

    def _generation(self, generation: int, genomes: list[list[float]]) -> list[Candidate]:
        first = len(self.candidates)
        alive = list(range(len(genomes)))
        latest: dict[int, tuple[EvaluationOutcome, float]] = {}
        for share in (*self.search.fidelity, 1.0):
            jobs = [
                EvaluationJob(first + i, self.space.recipe(genomes[i]), "search", share)
                for i in alive
            ]
            lines = [_line(self.space, generation, genomes[i]) for i in alive]
            outcomes = self.evaluations.of("candidate", jobs, lines)
            for i, outcome in zip(alive, outcomes, strict=True):
                latest[i] = outcome, share
            if share < 1.0:
                survivors = math.ceil(self.search.keep * len(alive))
                scored = [i for i in alive if not latest[i][0].error]
                order = {i: self._score(latest[i][0], share).order for i in scored}
                alive = sorted(scored, key=lambda i: (*order[i], i))[:survivors]
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
            for outcome, share in [latest[i]]
        ]

    def _score(self, outcome: EvaluationOutcome, share: float) -> CandidateScore:
        return self.split.score(outcome.values, self.base(share))

    def _tell(self, proposed: list[list[float]], candidates: Sequence[Candidate]) -> None:
        stages = (*self.search.fidelity, 1.0)
        scores = [
            None
            if candidate.outcome.error
            else candidate.score or self._score(candidate.outcome, candidate.share)
            for candidate in candidates
        ]
        for score in scores:
            if score is not None:
                self._ranking.see(score)
        ranks = [
            self._ranking.failed()
            if score is None
            # Ruled out: the earlier, the worse the rank.
            else self._ranking.of(score, len(stages) - 1 - stages.index(candidate.share))
            for candidate, score in zip(candidates, scores, strict=True)
        ]
        self.optimizer.tell(proposed, [rank for rank, _ in ranks], [parts for _, parts in ranks])


def _line(space: Space, generation: int, genome: list[float]) -> dict[str, Any]:
    """A candidate in the journal."""
    values = plain_values(space, genome)
    return {"generation": generation, "genome": genome, "parameters": values}


class Asynchronous(_SearchLoop):
    """A search without generations."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._population = self.optimizer.population
        self._genomes: list[list[float]] = []  # by number
        self._pending: set[int] = set()

    def run(self) -> None:
        """Until the evaluations are used up, or the optimizer has converged."""
        for kind, number, genome, outcome in self.evaluations.replay():
            if kind == "asked":
                if self._ask() != (number, genome):
                    raise self.evaluations.contradicts(number)
            elif outcome is not None:
                self._take(outcome)
        for outcome in self.evaluations.stream("candidate", self._jobs()):
            self._take(outcome)
        self.ended = self.optimizer.ended or f"all {self.search.evaluations} evaluations are used"

    def _jobs(self) -> Iterator[tuple[EvaluationJob, Mapping[str, Any]]]:
        """Candidates in evaluation when the search was stopped, then new ones on demand."""
        for number in sorted(self._pending):
            yield self._job(number)
        while len(self._genomes) < self.search.evaluations and not self.optimizer.ended:
            number, genome = self._ask()
            self.evaluations.asked(number, genome)
            yield self._job(number)

    def _ask(self) -> tuple[int, list[float]]:
        number, genome = len(self._genomes), self.optimizer.ask_one()
        self._genomes.append(genome)
        self._pending.add(number)
        return number, genome

    def _job(self, number: int) -> tuple[EvaluationJob, Mapping[str, Any]]:
        genome = self._genomes[number]
        line = _line(self.space, number // self._population, genome)
        return EvaluationJob(number, self.space.recipe(genome)), line

    def _take(self, outcome: EvaluationOutcome) -> None:
        """Remember a candidate and tell the optimizer."""
        number = outcome.number
        self._pending.discard(number)
        genome = self._genomes[number]
        score = None
        if not outcome.error:
            score = self.split.score(outcome.values, self.base(1.0))
            self._ranking.see(score)
        generation = number // self._population
        self.candidates.append(Candidate(number, generation, genome, outcome, score))
        rank = self._ranking.failed() if score is None else self._ranking.of(score)
        self.optimizer.tell_one(genome, *rank)
