"""Filters of a recipe that mean no tensor at all: most likely misspelt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from merge_cli.recipe.schema import Parameters, Recipe
from merge_cli.recipe.values import filters, matches


def idle_filters(recipe: Recipe, names: Sequence[str]) -> Iterator[str]:
    """One line for each filter that matches none of the output's tensors.

    Args:
        names: of all the output's tensors.
    """
    groups: list[Parameters] = [
        recipe.parameters,
        *(module.parameters for module in recipe.modules),
        *(piece.parameters for piece in recipe.all_slices),
        *(spec.parameters for spec in recipe.source_specs),
    ]
    known: dict[str, bool] = {}
    for parameter in (one for group in groups for one in group.values()):
        for filter in sorted(filters(parameter.setting)):
            if filter not in known:
                known[filter] = any(matches(filter, name) for name in names)
            if not known[filter]:
                line, _ = recipe.places.get(parameter.key, (0, 0))
                place = f"{parameter.key}, line {line} of the recipe"
                yield f"{place}: the filter '{filter}' matches no tensor and has no effect"
