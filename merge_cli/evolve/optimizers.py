"""Optimizers that propose genomes by `ask` and `tell`: random search, CMA-ES, Optuna's samplers.

An optimizer is seeded: the same sequence of `ask` and `tell` gives the same genomes bit for bit, so
that a journal is all the state that a search needs.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from merge_cli.errors import ResourceError
from merge_cli.evolve.space import Space, default_population
from merge_cli.recipe.search import Search

Genomes = list[list[float]]


@dataclass(frozen=True)
class EvaluatedGenome:
    """A genome with its result, as `Optimizer.tell` gets it."""

    genome: list[float]
    rank: float
    parts: tuple[float, ...]


_HINT = "pip install 'merge-cli[evolve]'"


class Optimizer(Protocol):
    """Proposes genomes.

    Attributes:
        population: number of genomes in the next generation.
        ended: why there are no more genomes; empty until then.
    """

    population: int
    ended: str

    def ask(self) -> Genomes:
        """The next generation."""

    def tell(
        self, genomes: Genomes, ranks: Sequence[float], parts: Sequence[Sequence[float]]
    ) -> None:
        """The results of the genomes of `ask`.

        Args:
            ranks: one number for each, lower is better; finite, also for failures.
            parts: the goals of each, lower is better, for multi-objective optimizers.
        """

    def ask_one(self) -> list[float]:
        """One more genome, while others are still evaluated."""

    def tell_one(self, genome: list[float], rank: float, parts: Sequence[float]) -> None:
        """The result of a genome of `ask_one`; in any order."""


def make_optimizer(
    search: Search,
    space: Space,
    seed: int,
    start: list[float],
    goals: int,
    evaluated: Sequence[EvaluatedGenome] = (),
) -> Optimizer:
    """The recipe's optimizer; its first genome is `start`, unless that is evaluated already.

    Args:
        goals: number of goals, for multi-objective optimizers.
        evaluated: static merges that the space expresses. TPE learns from all of them; CMA-ES
            and random search do not propose them again.

    Raises:
        ResourceError: its package is missing.
    """
    population = search.population or default_population(len(space))
    is_new = all(item.genome != start for item in evaluated)
    if search.optimizer == "random":
        return RandomSearch(len(space), population, seed, start if is_new else None)
    if search.optimizer == "cma-es":
        return CMAES(search, len(space), population, seed, start, propose_start=is_new)
    return OptunaSampler(
        search, space, population, seed, start if is_new else None, goals, evaluated
    )


def batch_size(search: Search, population: int) -> int:
    """Candidates that are proposed before the optimizer gets their results.

    TPE proposes one for each worker: whatever it knows earlier makes the next proposal better.
    """
    by_one = search.optimizer == "tpe" and not search.fidelity
    return search.workers if by_one else population


class RandomSearch:
    """Independent random sampling: the baseline for other optimizers."""

    def __init__(self, size: int, population: int, seed: int, start: list[float] | None) -> None:
        import numpy as np

        self._random = np.random.default_rng(seed)
        self._size, self._start = size, [] if start is None else [start]
        self.population, self.ended = population, ""

    def ask_one(self) -> list[float]:
        if self._start:
            return self._start.pop()
        genome: list[float] = self._random.random(self._size).tolist()
        return genome

    def tell_one(self, genome: list[float], rank: float, parts: Sequence[float]) -> None:
        pass

    def ask(self) -> Genomes:
        drawn = self._random.random((self.population, self._size)).tolist()
        genomes = [*self._start, *drawn][: self.population]
        self._start = []
        return genomes

    def tell(
        self, genomes: Genomes, ranks: Sequence[float], parts: Sequence[Sequence[float]]
    ) -> None:
        pass


class CMAES:
    """CMA-ES with bounds (Hansen, arXiv:1604.00772, pycma); restarts double the population."""

    def __init__(
        self,
        search: Search,
        size: int,
        population: int,
        seed: int,
        start: list[float],
        *,
        propose_start: bool = True,
    ) -> None:
        import numpy as np

        self._random = np.random.default_rng(seed)
        self._sigma, self._restarts, self._size = search.sigma, search.restarts, size
        self.population, self.ended = population, ""
        self._proposed: list[Any] = []
        self._pending: set[tuple[float, ...]] = set()  # of `ask_one` since the last start
        self._results: list[tuple[Any, float]] = []
        self._drawn: Genomes = []  # of the current distribution, still to be proposed
        self._begin(start, propose_start=propose_start)

    def _begin(self, start: list[float], *, propose_start: bool) -> None:
        import numpy as np

        try:
            with warnings.catch_warnings():
                # Without matplotlib it warns that it cannot plot.
                warnings.simplefilter("ignore", UserWarning)
                import cma
        except ImportError:
            raise ResourceError("cma-es needs the package cma", hint="pip install cma") from None
        self._pending.clear()
        self._results, self._drawn, self._proposed = [], [], []
        # pycma needs two dimensions at least: add one that nothing depends on.
        start = [*start, *[0.5] * (2 - self._size)]
        self._es: Any = cma.CMAEvolutionStrategy(
            start,
            self._sigma,
            {
                "bounds": [0, 1],
                "popsize": self.population,
                "verbose": -9,
                # Our generator: other code would advance the global one.
                "seed": np.nan,
                "randn": lambda *shape: self._random.standard_normal(shape),
                "maxiter": math.inf,
                "maxfevals": math.inf,
            },
        )
        if propose_start:
            self._es.inject([start], force=True)

    def ask(self) -> Genomes:
        self._proposed = self._es.ask()
        return [[float(u) for u in genome[: self._size]] for genome in self._proposed]

    def tell(
        self, genomes: Genomes, ranks: Sequence[float], parts: Sequence[Sequence[float]]
    ) -> None:
        self._es.tell(self._proposed, list(ranks))
        self._after_generation()

    def ask_one(self) -> list[float]:
        if not self._drawn:  # a population at a time, as pycma needs it
            self._drawn = list(reversed(self.ask()))
        genome = self._drawn.pop()
        self._pending.add(tuple(genome))
        return genome

    def tell_one(self, genome: list[float], rank: float, parts: Sequence[float]) -> None:
        """Results of a population make a generation, from whichever distributions they come.

        pycma treats genomes that its current distribution did not draw as injected, and shortens
        steps that are too long for it.
        """
        import cma
        import numpy as np

        if tuple(genome) not in self._pending:
            return  # proposed before a restart
        self._pending.discard(tuple(genome))
        self._results.append((np.array([*genome, *[0.5] * (2 - self._size)]), rank))
        if len(self._results) >= self.population:
            if not self._proposed:  # pycma requires `ask` before `tell`
                self.ask()
            results, self._results, self._proposed, self._drawn = self._results, [], [], []
            with warnings.catch_warnings():
                # The first candidate, which was injected, may return generations later.
                warnings.simplefilter("ignore", cma.evolution_strategy.InjectionWarning)
                self._es.tell([x for x, _ in results], [value for _, value in results])
            self._after_generation()

    def _after_generation(self) -> None:
        reasons = self._es.stop()
        if not reasons:
            return
        if not self._restarts:
            self.ended = "CMA-ES has converged: " + ", ".join(
                f"{k} {v}" for k, v in reasons.items()
            )
            return
        self._restarts -= 1
        self.population *= 2
        self._begin(self._random.random(self._size).tolist(), propose_start=False)


class OptunaSampler:
    """Optuna's TPE (one goal) and NSGA-II (several goals)."""

    def __init__(
        self,
        search: Search,
        space: Space,
        population: int,
        seed: int,
        start: list[float] | None,
        goals: int,
        evaluated: Sequence[EvaluatedGenome] = (),
    ) -> None:
        kind = search.optimizer
        try:
            import optuna
        except ImportError:
            raise ResourceError(f"{kind} needs the package optuna", hint=_HINT) from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._several = kind == "nsga2"
        sampler: Any = (
            optuna.samplers.NSGAIISampler(seed=seed, population_size=population)
            if self._several
            # With a constant liar, candidates that are being evaluated count as bad ones.
            else optuna.samplers.TPESampler(
                seed=seed,
                n_startup_trials=population,
                constant_liar=search.workers > 1 or batch_size(search, population) > 1,
            )
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
        for item in evaluated:
            self._study.add_trial(
                optuna.trial.create_trial(
                    params=self._params(item.genome),
                    distributions=self._space,
                    **({"values": list(item.parts)} if self._several else {"value": item.rank}),
                )
            )
        if start is not None:
            self._study.enqueue_trial(self._params(start))
        self._trials: list[Any] = []
        self._pending: list[tuple[list[float], Any]] = []
        self.population, self.ended = batch_size(search, population), ""

    def ask(self) -> Genomes:
        self._trials = [self._study.ask(self._space) for _ in range(self.population)]
        return [self._genome(trial) for trial in self._trials]

    def ask_one(self) -> list[float]:
        trial = self._study.ask(self._space)
        genome = self._genome(trial)
        self._pending.append((genome, trial))
        return genome

    def tell_one(self, genome: list[float], rank: float, parts: Sequence[float]) -> None:
        index = next(i for i, (pending, _) in enumerate(self._pending) if pending == genome)
        _, trial = self._pending.pop(index)
        self._study.tell(trial, list(parts) if self._several else rank)

    def _params(self, genome: Sequence[float]) -> dict[str, Any]:
        return {
            name: min(int(u * choices), choices - 1) if choices else u
            for name, u, choices in zip(self._space, genome, self._choices, strict=True)
        }

    def _genome(self, trial: Any) -> list[float]:
        return [
            (trial.params[name] + 0.5) / choices if choices else float(trial.params[name])
            for name, choices in zip(self._space, self._choices, strict=True)
        ]

    def tell(
        self, genomes: Genomes, ranks: Sequence[float], parts: Sequence[Sequence[float]]
    ) -> None:
        # A last generation may be smaller than the proposed one.
        results = zip(self._trials, ranks, parts, strict=False)
        for trial, rank, goals in results:
            self._study.tell(trial, list(goals) if self._several else rank)
