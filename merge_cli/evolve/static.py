"""Merges that need no search: every search evaluates them, and none ends below the best of them.

The uniform soup, the base, each source alone, task arithmetic with one scale, and Fisher merging
where all models have data. Where the search space can express such a merge (to the six digits that
values have), the optimizer learns its score.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from merge_cli.evolve.layer_space import LayerSpace
from merge_cli.evolve.space import METHOD, Space
from merge_cli.methods.blocks import operand_specs
from merge_cli.methods.registry import get_method
from merge_cli.recipe.schema import Recipe, SourceSpec
from merge_cli.recipe.values import Parameter, Scalar, evaluate

SOUP, BASE, FISHER = "uniform soup", "base", "fisher"
SCALES = tuple(i / 10 for i in range(1, 11))  # task arithmetic's lambda
# Methods that are a weighted sum of task vectors with these values, and weighted averages.
_SUMS: dict[str, dict[str, Scalar]] = {
    "task_arithmetic": {"normalize": False},
    "dare": {"normalize": False, "density": 1.0},
    "dare_linear": {"normalize": False, "density": 1.0},
}
_AVERAGES: dict[str, dict[str, Scalar]] = {
    "soup": {"normalize": True},
    "linear": {"normalize": True},
}
_TOLERANCE = 1e-6


@dataclass(frozen=True)
class StaticMerge:
    """A merge that needs no search.

    Attributes:
        genome: that means the same merge; empty where the space cannot express it.
        weights: of each of the recipe's models: in an average, or of its task vector.
    """

    name: str
    recipe: Recipe
    genome: list[float] = field(default_factory=list)
    weights: tuple[float, ...] = ()


def static_merges(recipe: Recipe, space: Space | None) -> tuple[StaticMerge, ...]:
    """Soup, base, sources and task arithmetic's line, in the order of their evaluation.

    Args:
        space: None for a greedy soup, which tries the sources itself and is an average: then soup
            and base.
    """
    specs = tuple(replace(spec, parameters={}) for spec in recipe.models)
    count = len(specs)
    average = [1.0 / count] * count
    merges = [StaticMerge(SOUP, _soup(recipe, specs, [1.0] * count), weights=tuple(average))]
    if space is None:
        merges[0] = replace(merges[0], genome=[1.0] * count)
    has_base = recipe.base_model is not None
    if has_base and all(spec.model != recipe.base_model for spec in specs):
        none = [0.0] * count
        merges.append(StaticMerge(BASE, _scaled(recipe, specs, 0.0), weights=tuple(none)))
    if space is None:
        return tuple(merges)
    labels = [str(spec.model) for spec in specs]
    for i, label in enumerate(labels):
        alone = [float(i == j) for j in range(count)]
        merges.append(StaticMerge(label, _soup(recipe, specs, alone), weights=tuple(alone)))
    if has_base:
        for scale in SCALES:
            name = f"task arithmetic {scale:g}"
            weights = (scale,) * count
            merges.append(StaticMerge(name, _scaled(recipe, specs, scale), weights=weights))
    if isinstance(space, LayerSpace):
        return tuple(_parent(merge, space) for merge in merges)
    expressed = tuple(_expressed(merge, space) for merge in merges)
    if space.search.in_space:
        return tuple(merge for merge in expressed if merge.genome)
    return expressed


def fisher_merge(recipe: Recipe) -> StaticMerge | None:
    """Fisher merging of all models; None where one has no data.

    Args:
        recipe: as it was written: of what it becomes without a search, data are no part.
    """
    if not all(spec.data for spec in recipe.models):
        return None
    specs = tuple(replace(spec, parameters={}) for spec in recipe.models)
    return StaticMerge(FISHER, recipe.with_result("fisher", models=specs, parameters={}))


def without_data(recipe: Recipe) -> Recipe:
    """The recipe without the models' data, which methods that look at none refuse."""
    specs = tuple(replace(spec, data=None) for spec in recipe.models)
    return replace(recipe, models=specs, statistics=None)


def _soup(recipe: Recipe, specs: Sequence[SourceSpec], weights: Sequence[float]) -> Recipe:
    """An average of all models: with weight 0, too, so that all merges have one frame."""
    if len(set(weights)) > 1:
        specs = [
            replace(spec, parameters={"weight": Parameter("weight", weight, "weight")})
            for spec, weight in zip(specs, weights, strict=True)
        ]
    return recipe.with_result("soup", models=tuple(specs), parameters={})


def _scaled(recipe: Recipe, specs: Sequence[SourceSpec], scale: float) -> Recipe:
    parameters = {"lambda": Parameter("lambda", scale, "parameters.lambda")}
    return recipe.with_result("task_arithmetic", models=tuple(specs), parameters=parameters)


def _parent(merge: StaticMerge, space: LayerSpace) -> StaticMerge:
    """With the genome of all its layers, if it is one of the models."""
    if max(merge.weights) == 1.0 and math.fsum(merge.weights) == 1.0:
        return replace(merge, genome=space.whole(merge.weights.index(1.0)))
    return merge


def _expressed(merge: StaticMerge, space: Space) -> StaticMerge:
    """With the space's genome and recipe, if it has one for this merge."""
    for name in space.methods:
        for values, weights in _descriptions(name, merge.weights, space.base):
            genome = _genome(space, name, values, weights)
            recipe = space.recipe(genome)
            if recipe.merge_method == name and _means(recipe, space, values, weights):
                return replace(merge, recipe=recipe, genome=genome)
    return merge


def _descriptions(
    name: str, weights: Sequence[float], recipe: Recipe
) -> list[tuple[dict[str, Scalar], Sequence[float]]]:
    """Shared values and weights with which a method is this merge."""
    if name in _AVERAGES:
        return [(_AVERAGES[name], weights)] if abs(sum(weights) - 1) < _TOLERANCE else []
    if name not in _SUMS:
        return []
    descriptions: list[tuple[dict[str, Scalar], Sequence[float]]] = [
        ({**_SUMS[name], "lambda": 1.0}, weights)
    ]
    if len(set(weights)) == 1:
        ones = [1.0] * len(weights)
        descriptions.append(({**_SUMS[name], "lambda": weights[0]}, ones))
    return descriptions


def _genome(
    space: Space, method: str, values: Mapping[str, Scalar], weights: Sequence[float]
) -> list[float]:
    """These values where they are searched; the middle of what they leave open."""
    genome = []
    for gene in space.genes:
        name = gene.searched.name
        value: Any = method if name == METHOD else values.get(name)
        if name == "weight":
            value = weights[gene.model] if gene.model is not None else weights[0]
        genome.append(0.5 if value is None else gene.number(value))
    return genome


def _means(
    recipe: Recipe, space: Space, values: Mapping[str, Scalar], weights: Sequence[float]
) -> bool:
    """Whether a recipe has these values for all models, layers and tensors."""
    method = get_method(recipe.merge_method)
    operands = {spec.key for spec in operand_specs(recipe, method, recipe.models)}
    for i, spec in enumerate(recipe.models):
        if spec.key not in operands:
            continue
        for name, value in {**values, "weight": weights[i]}.items():
            if name not in method.parameters:
                continue
            given = spec.parameters.get(name) or recipe.parameters.get(name)
            for part in (*space.search.filters, ""):
                for layer in range(space.layers):
                    position = layer / max(space.layers - 1, 1)
                    actual = None if given is None else evaluate(given.setting, part, position)
                    if actual is None:
                        actual = method.parameters[name].default
                    if not _equal(actual, value):
                        return False
    return True


def _equal(actual: Any, value: Scalar) -> bool:
    if isinstance(value, float) and isinstance(actual, int | float):
        return abs(actual - value) <= _TOLERANCE * max(1.0, abs(value))
    return bool(actual == value)


def soup_start(space: Space) -> list[float]:
    """Where a search starts that can express no static merge: near the soup.

    Weights sum to 1, `lambda` is 1 and `density` and `t` are in the middle, as far as the ranges
    allow it.
    """
    count = len(space.base.models)
    genome = [0.5] * len(space)
    for i, gene in enumerate(space.genes):
        if gene.searched.choices:
            continue
        if gene.searched.name == "weight":
            genome[i] = gene.number(1.0 / count)
        elif gene.searched.name == "lambda":
            genome[i] = gene.number(1.0)
    return genome
