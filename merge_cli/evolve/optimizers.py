"""The optimizer that a recipe asks for: random search, CMA-ES, or one of Optuna's samplers."""

from __future__ import annotations

from collections.abc import Sequence

from merge_cli.evolve.cma_es import CMAES
from merge_cli.evolve.optimizer import EvaluatedGenome, Genomes, Optimizer
from merge_cli.evolve.optuna_sampler import OptunaSampler
from merge_cli.evolve.space import Space, default_population
from merge_cli.recipe.search import Search


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
