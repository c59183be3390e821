"""Who proposes genomes: behind `ask` and `tell`, seeded, and a function of what they were told.

An optimizer that is asked and told the same again gives the same answers bit for bit, so that a
journal is all the state that a search needs.

What an optimizer is told instead of a score, where a candidate has none or breaks a constraint.

In this order: scores, candidates that a smaller share of the rows has ruled out, those that break a
constraint, those that failed. The numbers keep clear of the scores, whatever their size: they are
multiples of the largest one seen.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, Protocol

from merge_cli.errors import ResourceError
from merge_cli.evolve.objectives import CandidateScore
from merge_cli.evolve.space import Space, default_population
from merge_cli.recipe.search import Search

Genomes = list[list[float]]
_HINT = "pip install 'merge-cli[evolve]'"


class Optimizer(Protocol):
    """What proposes.

    Attributes:
        population: genomes of the next generation.
        ended: why there will be no more; empty until then.
    """

    population: int
    ended: str

    def ask(self) -> Genomes:
        """The next generation."""

    def tell(
        self, genomes: Genomes, ranks: Sequence[float], parts: Sequence[Sequence[float]]
    ) -> None:
        """What came of it.

        Args:
            ranks: one number for each, lower is better; finite, also for what failed.
            parts: the goals of each, lower is better, for optimizers of several.
        """

    def ask_one(self) -> list[float]:
        """One more genome, while others are still out."""

    def tell_one(self, genome: list[float], rank: float, parts: Sequence[float]) -> None:
        """What came of one that `ask_one` gave; in any order."""


def make_optimizer(
    search: Search, space: Space, seed: int, start: list[float], goals: int
) -> Optimizer:
    """The one that the recipe asks for; its first genome is `start`.

    Args:
        goals: how many there are, for optimizers of several.

    Raises:
        ResourceError: its package is missing.
    """
    population = search.population or default_population(len(space))
    if search.optimizer == "random":
        return RandomSearch(len(space), population, seed, start)
    if search.optimizer == "cma-es":
        return CMAES(search, len(space), population, seed, start)
    return Sampled(search.optimizer, space, population, seed, start, goals)


class RandomSearch:
    """Every number drawn by itself: what anything cleverer has to beat."""

    def __init__(self, size: int, population: int, seed: int, start: list[float]) -> None:
        import numpy as np

        self._random = np.random.default_rng(seed)
        self._size, self._start = size, [start]
        self.population, self.ended = population, ""

    def ask_one(self) -> list[float]:
        if self._start:
            return self._start.pop()
        drawn: list[float] = self._random.random(self._size).tolist()
        return drawn

    def tell_one(self, genome: list[float], rank: float, parts: Sequence[float]) -> None:
        pass

    def ask(self) -> Genomes:
        drawn = self._random.random((self.population, self._size)).tolist()
        result = [*self._start, *drawn][: self.population]
        self._start = []
        return result

    def tell(
        self, genomes: Genomes, ranks: Sequence[float], parts: Sequence[Sequence[float]]
    ) -> None:
        pass


class CMAES:
    """CMA-ES with bounds (Hansen, arXiv:1604.00772, in pycma), and restarts with twice as many."""

    def __init__(
        self, search: Search, size: int, population: int, seed: int, start: list[float]
    ) -> None:
        import numpy as np

        self._random = np.random.default_rng(seed)
        self._sigma, self._restarts, self._size = search.sigma, search.restarts, size
        self.population, self.ended = population, ""
        self._asked: list[Any] = []
        self._out: set[tuple[float, ...]] = set()  # asked for one by one since it began
        self._told: list[tuple[Any, float]] = []
        self._drawn: Genomes = []  # of the present distribution, still to be handed out
        self._begin(start, first=True)

    def _begin(self, start: list[float], *, first: bool) -> None:
        import numpy as np

        try:
            with warnings.catch_warnings():
                # Without matplotlib it warns that it cannot draw, which nobody asked it to.
                warnings.simplefilter("ignore", UserWarning)
                import cma
        except ImportError:
            raise ResourceError("cma-es needs the package cma", hint="pip install cma") from None
        self._out.clear()
        self._told, self._drawn, self._asked = [], [], []
        # pycma wants two dimensions at least; a second one that nothing depends on does no harm.
        start = [*start, *[0.5] * (2 - self._size)]
        self._es: Any = cma.CMAEvolutionStrategy(
            start,
            self._sigma,
            {
                "bounds": [0, 1],
                "popsize": self.population,
                "verbose": -9,
                # Its own numbers: a global generator would be moved by others.
                "seed": np.nan,
                "randn": lambda *shape: self._random.standard_normal(shape),
                "maxiter": math.inf,
                "maxfevals": math.inf,
            },
        )
        if first:
            self._es.inject([start], force=True)

    def ask(self) -> Genomes:
        self._asked = self._es.ask()
        return [[float(u) for u in genome[: self._size]] for genome in self._asked]

    def tell(
        self, genomes: Genomes, ranks: Sequence[float], parts: Sequence[Sequence[float]]
    ) -> None:
        self._es.tell(self._asked, list(ranks))
        self._after_generation()

    def ask_one(self) -> list[float]:
        if not self._drawn:  # a population at a time, as pycma counts
            self._drawn = list(reversed(self.ask()))
        genome = self._drawn.pop()
        self._out.add(tuple(genome))
        return genome

    def tell_one(self, genome: list[float], rank: float, parts: Sequence[float]) -> None:
        """As many as a population are a generation, whichever distributions they are from.

        pycma treats what its present distribution did not draw as injected, and shortens steps that
        would be too long for it.
        """
        import cma
        import numpy as np

        if tuple(genome) not in self._out:
            return  # of the time before a restart
        self._out.discard(tuple(genome))
        self._told.append((np.array([*genome, *[0.5] * (2 - self._size)]), rank))
        if len(self._told) >= self.population:
            if not self._asked:  # pycma wants to be asked before it is told
                self.ask()
            told, self._told, self._asked, self._drawn = self._told, [], [], []
            with warnings.catch_warnings():
                # The first candidate, which was injected, may come back generations later.
                warnings.simplefilter("ignore", cma.evolution_strategy.InjectionWarning)
                self._es.tell([x for x, _ in told], [value for _, value in told])
            self._after_generation()

    def _after_generation(self) -> None:
        why = self._es.stop()
        if not why:
            return
        if not self._restarts:
            self.ended = "CMA-ES has converged: " + ", ".join(f"{k} {v}" for k, v in why.items())
            return
        self._restarts -= 1
        self.population *= 2
        self._begin(self._random.random(self._size).tolist(), first=False)


class Sampled:
    """Optuna's TPE (one goal) and NSGA-II (several), asked for a generation at a time."""

    def __init__(
        self, kind: str, space: Space, population: int, seed: int, start: list[float], goals: int
    ) -> None:
        try:
            import optuna
        except ImportError:
            raise ResourceError(f"{kind} needs the package optuna", hint=_HINT) from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._several = kind == "nsga2"
        sampler: Any = (
            optuna.samplers.NSGAIISampler(seed=seed, population_size=population)
            if self._several
            else optuna.samplers.TPESampler(seed=seed, n_startup_trials=population)
        )
        self._study = optuna.create_study(
            sampler=sampler, directions=["minimize"] * (goals if self._several else 1)
        )
        self._choices = [len(gene.searched.choices) for gene in space.genes]
        self._space: dict[str, Any] = {
            f"{i:05d}": optuna.distributions.CategoricalDistribution(list(range(choices)))
            if choices
            else optuna.distributions.FloatDistribution(0.0, 1.0)
            for i, choices in enumerate(self._choices)
        }
        values = [
            min(int(u * choices), choices - 1) if choices else u
            for u, choices in zip(start, self._choices, strict=True)
        ]
        self._study.enqueue_trial(dict(zip(self._space, values, strict=True)))
        self._trials: list[Any] = []
        self._out: list[tuple[list[float], Any]] = []
        self.population, self.ended = population, ""

    def ask(self) -> Genomes:
        self._trials = [self._study.ask(self._space) for _ in range(self.population)]
        return [self._genome(trial) for trial in self._trials]

    def ask_one(self) -> list[float]:
        trial = self._study.ask(self._space)
        genome = self._genome(trial)
        self._out.append((genome, trial))
        return genome

    def tell_one(self, genome: list[float], rank: float, parts: Sequence[float]) -> None:
        place = next(i for i, (out, _) in enumerate(self._out) if out == genome)
        _, trial = self._out.pop(place)
        self._study.tell(trial, list(parts) if self._several else rank)

    def _genome(self, trial: Any) -> list[float]:
        return [
            (trial.params[name] + 0.5) / choices if choices else float(trial.params[name])
            for name, choices in zip(self._space, self._choices, strict=True)
        ]

    def tell(
        self, genomes: Genomes, ranks: Sequence[float], parts: Sequence[Sequence[float]]
    ) -> None:
        # A last generation may be smaller than what was asked for.
        told = zip(self._trials, ranks, parts, strict=False)
        for trial, rank, several in told:
            self._study.tell(trial, list(several) if self._several else rank)


_REJECTED, _VIOLATED, _FAILED = 1e3, 1e6, 1e9
Told = tuple[float, tuple[float, ...]]  # rank, and each goal's part


class Ranking:
    """Remembers how large scores are. A function of what it was shown, in order.

    Args:
        goals: how many parts a score has.
    """

    def __init__(self, goals: int) -> None:
        self._goals, self._size = goals, 1.0

    def see(self, score: CandidateScore) -> None:
        """Scores of a generation, before any of them is told."""
        self._size = max(self._size, abs(score.total), *map(abs, score.parts))

    def failed(self) -> Told:
        worst = _FAILED * self._size
        return worst, (worst,) * self._goals

    def of(self, score: CandidateScore, rejections: int = 0) -> Told:
        """Rank and parts.

        Args:
            rejections: stages that it was not let into; 0 for one with all rows.
        """
        penalty = _REJECTED * rejections * self._size
        if score.violation:
            # Within one multiple, so that the order by violation leaves what comes behind alone.
            share = score.violation / (1.0 + score.violation)
            penalty += _VIOLATED * (1.0 + share) * self._size
            return penalty, tuple(part + penalty for part in score.parts)
        return penalty + score.total, tuple(part + penalty for part in score.parts)
