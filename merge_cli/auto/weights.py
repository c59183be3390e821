"""A short search over one weight for each source: CMA-ES from the best merge without data.

Weights are of task vectors where there is a base, of an average elsewhere. Candidates are measured
on rows to learn from, so that the rows that choose among steps stay untouched.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from merge_cli.evolve.cma_es import CMAES
from merge_cli.evolve.space import default_population
from merge_cli.recipe.schema import Recipe
from merge_cli.recipe.search import Search
from merge_cli.recipe.values import Parameter

Weights = tuple[float, ...]

_LOW, _HIGH = -0.25, 1.25  # a source may be damped, or a little more than itself
_STEP = 0.12  # CMA-ES's first step, as a share of the range
_GENERATIONS = 6
_DIGITS = 4  # of a weight, so that the recipe can be read
_NO_NUMBER = 1e9  # instead of the loss of a merge that predicts NaN; CMA-ES only ranks


def candidate_count(sources: int) -> int:
    """How many candidates a search measures."""
    return _GENERATIONS * default_population(sources)


class WeightSearch:
    """Generations of weights, from `start` on; the same losses give the same ones.

    Attributes:
        generation: candidates whose losses are to be told next; empty when the search has ended.
    """

    def __init__(self, start: Weights, seed: int) -> None:
        self._optimizer = CMAES(
            Search(sigma=_STEP),
            len(start),
            default_population(len(start)),
            seed,
            [_share(weight) for weight in start],
        )
        self._left = _GENERATIONS
        self._scored: list[tuple[float, Weights]] = []
        self.generation: list[Weights] = []
        self._ask()

    @property
    def best(self) -> Weights:
        """With the lowest loss so far; of equals the first."""
        return min(self._scored, key=lambda item: item[0])[1]

    def tell(self, losses: Sequence[float]) -> None:
        """The losses of a generation; NaN where a merge predicts no numbers."""
        values = [loss if math.isfinite(loss) else _NO_NUMBER for loss in losses]
        self._scored += zip(values, self.generation, strict=True)
        self._optimizer.tell(self._genomes, values, [(value,) for value in values])
        self._left -= 1
        self.generation = []
        if self._left and not self._optimizer.ended:
            self._ask()

    def _ask(self) -> None:
        self._genomes = self._optimizer.ask()
        self.generation = [tuple(_weight(u) for u in genome) for genome in self._genomes]


def weighted(recipe: Recipe, weights: Sequence[float]) -> Recipe:
    """A static merge with a weight for each of its models."""
    models = tuple(
        replace(spec, parameters={"weight": Parameter("weight", weight, f"{spec.key}.weight")})
        for spec, weight in zip(recipe.models, weights, strict=True)
    )
    return replace(recipe, models=models)


def _share(weight: float) -> float:
    return min(1.0, max(0.0, (weight - _LOW) / (_HIGH - _LOW)))


def _weight(share: float) -> float:
    return round(_LOW + share * (_HIGH - _LOW), _DIGITS)
