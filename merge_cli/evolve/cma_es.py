"""CMA-ES as an optimizer: pycma, told in generations or one by one."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

from merge_cli.errors import ResourceError
from merge_cli.evolve.optimizer import Genomes
from merge_cli.recipe.search import Search


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
