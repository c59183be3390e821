"""What the numbers of a genome mean: each sets one parameter of some models, layers and tensors.

A genome is a list of numbers in [0, 1]. `Space.recipe` turns it into a static recipe: scalars,
gradients over layers and filters, as anybody could have written them by hand.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from merge_cli.errors import RecipeError, UsageError
from merge_cli.methods.blocks import operand_specs
from merge_cli.methods.registry import Method, get_method
from merge_cli.recipe.reference import local_folder, short_labels
from merge_cli.recipe.schema import Recipe, SourceSpec
from merge_cli.recipe.search import Search, SearchedParameter
from merge_cli.recipe.values import (
    Gradient,
    Parameter,
    Rule,
    Scalar,
    Setting,
    evaluate,
)

METHOD = "method"
Genome = Sequence[float]


@dataclass(frozen=True)
class Gene:
    """One number of a genome.

    Attributes:
        model: index in the recipe's `models`; None for all of them.
        part: the filter that tensors must match; None for the rest, or for all.
        group: number of the group of layers; None for all layers.
    """

    searched: SearchedParameter
    model: int | None = None
    part: str | None = None
    group: int | None = None

    def value(self, u: float) -> Scalar:
        """What a number in [0, 1] means. Six digits: recipes are read by people."""
        one = self.searched
        u = min(max(u, 0.0), 1.0)
        if one.choices:
            return one.choices[min(int(u * len(one.choices)), len(one.choices) - 1)]
        if one.integer:
            count = int(one.high - one.low) + 1
            return int(one.low) + min(int(u * count), count - 1)
        if u in (0.0, 1.0):
            return one.high if u else one.low
        if one.log:
            low, high = math.log(one.low), math.log(one.high)
            result = math.exp(low + u * (high - low))
        else:
            result = one.low + u * (one.high - one.low)
        return min(max(float(f"{result:.6g}"), one.low), one.high)

    def number(self, value: Scalar) -> float:
        """The number in [0, 1] that means a value; the nearest, for one out of range."""
        one = self.searched
        if one.choices:
            place = one.choices.index(value) if value in one.choices else 0
            return (place + 0.5) / len(one.choices)
        given = min(max(float(value), one.low), one.high)
        if one.integer:
            return (round(given) - one.low + 0.5) / (one.high - one.low + 1)
        if one.log:
            return math.log(given / one.low) / math.log(one.high / one.low)
        return (given - one.low) / (one.high - one.low)


class Space:
    """All genes of a recipe that searches.

    Args:
        layers: of these models.

    Raises:
        RecipeError: groups that these layers cannot be divided into.
    """

    def __init__(self, recipe: Recipe, layers: int) -> None:
        assert recipe.search is not None, "check_recipe refuses a recipe without the section"
        self.base, self.search, self.layers = recipe, recipe.search, layers
        self.sizes = _sizes(recipe, self.search, layers)
        self.methods = {name: get_method(name) for name in self.search.method}
        self.labels = short_labels([str(spec.model) for spec in recipe.models])
        genes: list[Gene] = []
        if len(self.methods) > 1:
            genes.append(
                Gene(SearchedParameter(METHOD, choices=self.search.method, key="search.method"))
            )
        for searched in self.search.parameters:
            genes += self._genes_of(searched)
        self.genes = tuple(genes)

    def __len__(self) -> int:
        return len(self.genes)

    def values(self, genome: Genome) -> list[Scalar]:
        """What each gene is set to."""
        return [gene.value(u) for gene, u in zip(self.genes, genome, strict=True)]

    def genome(self, values: Sequence[Scalar]) -> list[float]:
        """The genome that means these values."""
        return [gene.number(value) for gene, value in zip(self.genes, values, strict=True)]

    def recipe(self, genome: Genome) -> Recipe:
        """The static recipe that a genome means."""
        result = dict(zip(self.genes, self.values(genome), strict=True))
        name = str(
            next((v for g, v in result.items() if g.searched.name == METHOD), None)
            or self.search.method[0]
        )
        method = self.methods[name]
        shared, own = dict(self.base.parameters), [dict(s.parameters) for s in self.base.models]
        for searched in self.search.parameters:
            if searched.name not in method.parameters:
                continue
            per_model: dict[int | None, dict[Gene, Scalar]] = {}
            for gene, value in result.items():
                if gene.searched is searched:
                    per_model.setdefault(gene.model, {})[gene] = value
            for model, genes in per_model.items():
                setting = self._setting(genes)
                if model is None:
                    shared[searched.name] = Parameter(searched.name, setting, searched.key)
                    for parameters in own:  # what a model has of its own would win
                        parameters.pop(searched.name, None)
                else:
                    own[model][searched.name] = Parameter(searched.name, setting, searched.key)
        models = tuple(
            replace(spec, parameters=parameters)
            for spec, parameters in zip(self.base.models, own, strict=True)
        )
        return self.base.found(name, models=models, parameters=shared)

    def start_from(self, recipe: Recipe) -> list[float]:
        """The genome nearest to a static recipe of the same sources, in whatever order.

        Raises:
            UsageError: the recipe has other sources.
        """
        theirs = {_place_of(spec, recipe): spec for spec in recipe.models}
        ours = [_place_of(spec, self.base) for spec in self.base.models]
        other = [str(spec.model) for place, spec in theirs.items() if place not in ours]
        lacking = [
            label for label, place in zip(self.labels, ours, strict=True) if place not in theirs
        ]
        if other or lacking:
            message = "has other models than the search: " + ", ".join(
                [*(f"not {name}" for name in lacking), *(f"but {name}" for name in other)]
            )
            hint = "Start from a recipe of the same models."
            raise UsageError(message, where=recipe.file, hint=hint)
        values: list[Scalar] = []
        for gene, middle in zip(self.genes, self.values([0.5] * len(self)), strict=True):
            if gene.searched.name == METHOD:
                known = recipe.merge_method in self.methods
                values.append(recipe.merge_method if known else middle)
                continue
            spec = None if gene.model is None else theirs[ours[gene.model]]
            value = self._value_in(recipe, spec, gene)
            values.append(middle if value is None else value)
        return self.genome(values)

    def weighted(self, weights: Sequence[float]) -> list[float]:
        """The middle of every range, but each model's `weight` as given."""
        genome = [0.5] * len(self)
        for i, gene in enumerate(self.genes):
            if gene.searched.name == "weight" and gene.model is not None:
                genome[i] = gene.number(weights[gene.model])
        return genome

    def span(self, group: int) -> tuple[int, int]:
        """First and last layer of a group; of a smooth space, the anchor's layer twice."""
        if self.search.smooth:
            last = max(len(self.sizes) - 1, 1)
            layer = round(group * (self.layers - 1) / last)
            return layer, layer
        start = sum(self.sizes[:group])
        return start, start + self.sizes[group] - 1

    def describe(self, gene: Gene) -> str:
        """`weight of math, layers 0 to 2, self_attn`."""
        words = gene.searched.name
        if gene.model is not None:
            words += f" of {self.labels[gene.model]}"
        if gene.group is not None:
            first, last = self.span(gene.group)
            if first != last:
                words += f", layers {first} to {last}"
            else:
                words += f", {'at ' if self.search.smooth else ''}layer {first}"
        if gene.part is not None:
            words += f", {gene.part}"
        elif (
            self.search.filters
            and gene.searched.name != METHOD
            and ("filters" not in gene.searched.tied)
        ):
            words += ", other tensors"
        return words

    def _genes_of(self, searched: SearchedParameter) -> list[Gene]:
        owners = [m for m in self.methods.values() if searched.name in m.parameters]
        each = "models" not in searched.tied and owners[0].parameters[searched.name].per_model
        models: Sequence[int | None] = self._operands(owners[0]) if each else [None]
        parts: Sequence[str | None] = [None]
        if "filters" not in searched.tied:
            parts = [*self.search.filters, None]
        groups: Sequence[int | None] = [None]
        if "layers" not in searched.tied and len(self.sizes) > 1:
            groups = range(len(self.sizes))
        return [
            Gene(searched, model, part, group)
            for model in models
            for part in parts
            for group in groups
        ]

    def _operands(self, method: Method) -> list[int]:
        """The models that the formula runs over: a base among them has no parameters."""
        keys = {spec.key for spec in operand_specs(self.base, method, self.base.models)}
        return [i for i, spec in enumerate(self.base.models) if spec.key in keys]

    def _setting(self, genes: Mapping[Gene, Scalar]) -> Setting:
        parts: dict[str | None, list[Scalar]] = {}
        for gene, value in genes.items():
            parts.setdefault(gene.part, []).append(value)
        if set(parts) == {None}:
            return self._over_layers(parts[None])
        return tuple(Rule(part, self._over_layers(values)) for part, values in parts.items())

    def _over_layers(self, values: Sequence[Scalar]) -> Scalar | Gradient:
        if all(value == values[0] for value in values):
            return values[0]
        if self.search.smooth:
            return Gradient(tuple(values))
        # An anchor for every layer: whatever the groups' sizes, each layer has its group's value.
        steps = zip(values, self.sizes, strict=True)
        return Gradient(tuple(value for value, size in steps for _ in range(size)))

    def _value_in(self, recipe: Recipe, spec: SourceSpec | None, gene: Gene) -> Scalar | None:
        first, last = self.span(gene.group) if gene.group is not None else (0, 0)
        position = (first + last) / 2 / max(self.layers - 1, 1)
        for parameters in (spec.parameters if spec else {}, recipe.parameters):
            if gene.searched.name in parameters:
                value = evaluate(parameters[gene.searched.name].setting, gene.part or "", position)
                if value is not None:
                    return value
        return None


def _place_of(spec: SourceSpec, recipe: Recipe) -> str:
    """What tells whether two recipes mean the same model."""
    place = local_folder(spec.model.path, recipe.folder)
    return str(spec.model) if place is None or spec.model.lora else str(place.resolve())


def default_population(size: int) -> int:
    """4 + floor(3 ln n): Hansen's choice for CMA-ES, used for all optimizers."""
    return 4 + int(3 * math.log(max(size, 1)))


def _sizes(recipe: Recipe, search: Search, layers: int) -> tuple[int, ...]:
    """How many layers each group has; what does not divide evenly is spread."""
    requested = search.layer_groups
    if isinstance(requested, tuple):
        if sum(requested) != layers and not search.smooth:
            message = f"these groups have {sum(requested)} layers, and the models {layers}."
            raise RecipeError([recipe.problem("search.layer_groups", message)])
        if search.smooth:
            message = "a list of sizes has no meaning with `smooth`."
            raise RecipeError([recipe.problem("search.layer_groups", message, "Give a number.")])
        return requested
    if requested > max(layers, 1):
        message = f"{requested} groups of {layers} layers."
        raise RecipeError([recipe.problem("search.layer_groups", message)])
    ends = [round(i * layers / requested) for i in range(requested + 1)]
    return tuple(b - a for a, b in zip(ends, ends[1:], strict=False))


def plain_values(space: Space, genome: Genome) -> dict[str, Any]:
    """Values by what they set, for journals and tables."""
    return {
        space.describe(gene): value
        for gene, value in zip(space.genes, space.values(genome), strict=True)
    }
