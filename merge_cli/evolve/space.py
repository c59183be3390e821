"""The search space: each number of a genome sets a parameter of some models, layers, tensors.

A genome is a list of numbers in [0, 1]. `Space.recipe` turns it into a static recipe: scalars,
gradients over layers and filters, as in recipes written by hand.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from merge_cli.errors import RecipeError, UsageError
from merge_cli.evolve.defaults import with_default_ranges
from merge_cli.methods.blocks import operand_specs
from merge_cli.methods.method import Method
from merge_cli.methods.registry import get_method
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
        """The value of a number in [0, 1], with six digits, because people read recipes."""
        parameter = self.searched
        u = min(max(u, 0.0), 1.0)
        if parameter.choices:
            return parameter.choices[
                min(int(u * len(parameter.choices)), len(parameter.choices) - 1)
            ]
        if parameter.integer:
            count = int(parameter.high - parameter.low) + 1
            return int(parameter.low) + min(int(u * count), count - 1)
        if u in (0.0, 1.0):
            return parameter.high if u else parameter.low
        if parameter.log:
            low, high = math.log(parameter.low), math.log(parameter.high)
            scaled = math.exp(low + u * (high - low))
        else:
            scaled = parameter.low + u * (parameter.high - parameter.low)
        return min(max(float(f"{scaled:.6g}"), parameter.low), parameter.high)

    def number(self, value: Scalar) -> float:
        """The number in [0, 1] of a value; the nearest one for a value out of range."""
        parameter = self.searched
        if parameter.choices:
            index = parameter.choices.index(value) if value in parameter.choices else 0
            return (index + 0.5) / len(parameter.choices)
        clipped = min(max(float(value), parameter.low), parameter.high)
        if parameter.integer:
            return (round(clipped) - parameter.low + 0.5) / (parameter.high - parameter.low + 1)
        if parameter.log:
            return math.log(clipped / parameter.low) / math.log(parameter.high / parameter.low)
        return (clipped - parameter.low) / (parameter.high - parameter.low)


class Space:
    """All genes of a recipe that searches.

    Args:
        layers: how many the models have.

    Raises:
        RecipeError: layers that cannot be divided into these groups.
    """

    def __init__(self, recipe: Recipe, layers: int) -> None:
        assert recipe.search is not None, "check_recipe refuses a recipe without the section"
        self.base, self.search, self.layers = recipe, with_default_ranges(recipe.search), layers
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
        """The value of each gene."""
        return [gene.value(u) for gene, u in zip(self.genes, genome, strict=True)]

    def genome(self, values: Sequence[Scalar]) -> list[float]:
        """The genome of these values."""
        return [gene.number(value) for gene, value in zip(self.genes, values, strict=True)]

    def recipe(self, genome: Genome) -> Recipe:
        """The static recipe of a genome."""
        settings = dict(zip(self.genes, self.values(genome), strict=True))
        name = str(
            next((v for g, v in settings.items() if g.searched.name == METHOD), None)
            or self.search.method[0]
        )
        method = self.methods[name]
        shared, per_model = (
            dict(self.base.parameters),
            [dict(s.parameters) for s in self.base.models],
        )
        for searched in self.search.parameters:
            if searched.name not in method.parameters:
                continue
            by_model: dict[int | None, dict[Gene, Scalar]] = {}
            for gene, value in settings.items():
                if gene.searched is searched:
                    by_model.setdefault(gene.model, {})[gene] = value
            for model, genes in by_model.items():
                setting = self._setting(genes)
                if model is None:
                    shared[searched.name] = Parameter(searched.name, setting, searched.key)
                    for parameters in per_model:  # a model's own value would override it
                        parameters.pop(searched.name, None)
                else:
                    per_model[model][searched.name] = Parameter(
                        searched.name, setting, searched.key
                    )
        models = tuple(
            replace(spec, parameters=parameters, data=None)
            for spec, parameters in zip(self.base.models, per_model, strict=True)
        )
        return self.base.with_result(name, models=models, parameters=shared)

    def start_from(self, recipe: Recipe) -> list[float]:
        """The genome nearest to a static recipe of the same sources, in any order.

        Raises:
            UsageError: the recipe has other sources.
        """
        other_specs = {_identity(spec, recipe): spec for spec in recipe.models}
        identities = [_identity(spec, self.base) for spec in self.base.models]
        extra = [
            str(spec.model) for identity, spec in other_specs.items() if identity not in identities
        ]
        missing = [
            label
            for label, identity in zip(self.labels, identities, strict=True)
            if identity not in other_specs
        ]
        if extra or missing:
            message = "has other models than the search: " + ", ".join(
                [*(f"not {name}" for name in missing), *(f"but {name}" for name in extra)]
            )
            hint = "Start from a recipe of the same models."
            raise UsageError(message, where=recipe.file, hint=hint)
        values: list[Scalar] = []
        for gene, middle in zip(self.genes, self.values([0.5] * len(self)), strict=True):
            if gene.searched.name == METHOD:
                is_searched = recipe.merge_method in self.methods
                values.append(recipe.merge_method if is_searched else middle)
                continue
            spec = None if gene.model is None else other_specs[identities[gene.model]]
            value = self._value_in(recipe, spec, gene)
            values.append(middle if value is None else value)
        return self.genome(values)

    def weighted(self, weights: Sequence[float]) -> list[float]:
        """The middle of every range, with the given `weight` of each model."""
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
        for_each_model = (
            "models" not in searched.tied and owners[0].parameters[searched.name].per_model
        )
        models: Sequence[int | None] = self._operands(owners[0]) if for_each_model else [None]
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
        """The models that the method merges: a base among them has no parameters."""
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
        # An anchor for every layer, so that each layer has exactly its group's value.
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


def _identity(spec: SourceSpec, recipe: Recipe) -> str:
    """The identity of a model: equal where two recipes name the same one."""
    folder = local_folder(spec.model.path, recipe.folder)
    return str(spec.model) if folder is None or spec.model.lora else str(folder.resolve())


def default_population(size: int) -> int:
    """4 + floor(3 ln n): Hansen's choice for CMA-ES, used for all optimizers."""
    return 4 + int(3 * math.log(max(size, 1)))


def _sizes(recipe: Recipe, search: Search, layers: int) -> tuple[int, ...]:
    """How many layers each group has; remainders are spread."""
    groups = search.layer_groups
    if isinstance(groups, tuple):
        if sum(groups) != layers and not search.smooth:
            message = f"these groups have {sum(groups)} layers, and the models {layers}."
            raise RecipeError([recipe.problem("search.layer_groups", message)])
        if search.smooth:
            message = "a list of sizes has no meaning with `smooth`."
            raise RecipeError([recipe.problem("search.layer_groups", message, "Give a number.")])
        return groups
    if groups > max(layers, 1):
        message = f"{groups} groups of {layers} layers."
        raise RecipeError([recipe.problem("search.layer_groups", message)])
    ends = [round(i * layers / groups) for i in range(groups + 1)]
    return tuple(b - a for a, b in zip(ends, ends[1:], strict=False))


def plain_values(space: Space, genome: Genome) -> dict[str, Any]:
    """Values by what they set, for journals and tables."""
    return {
        space.describe(gene): value
        for gene, value in zip(space.genes, space.values(genome), strict=True)
    }
