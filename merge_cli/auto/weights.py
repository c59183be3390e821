"""A short search over one weight for each source: CMA-ES from the best merge without data.

Weights are of task vectors where there is a base, of an average elsewhere. Candidates are measured
on rows to learn from, so that the rows that choose among steps stay untouched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from merge_cli.evolve.optimizers import CMAES
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


def best_weights(start: Weights, seed: int, loss: Callable[[int, Weights], float]) -> Weights:
    """The weights with the lowest loss of all candidates; the first candidate is `start`.

    The same seed and losses give the same candidates, so that a journal of losses is all the state.

    Args:
        loss: of a candidate, given its number; NaN where it predicts no numbers.
    """
    optimizer = CMAES(
        Search(sigma=_STEP),
        len(start),
        default_population(len(start)),
        seed,
        [_share(weight) for weight in start],
    )
    scored: list[tuple[float, Weights]] = []
    for _ in range(_GENERATIONS):
        genomes = optimizer.ask()
        losses = []
        for genome in genomes:
            weights = tuple(_weight(u) for u in genome)
            value = loss(len(scored), weights)
            scored.append((value if math.isfinite(value) else _NO_NUMBER, weights))
            losses.append(scored[-1][0])
        optimizer.tell(genomes, losses, [(value,) for value in losses])
        if optimizer.ended:
            break
    return min(scored, key=lambda item: item[0])[1]


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
