"""What a plan tells of a recipe's settings: filters that mean no tensor, and gradients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from merge_cli.recipe.schema import Parameters, Recipe
from merge_cli.recipe.values import Parameter, filters, is_graded, matches


def unused_filters(recipe: Recipe, names: Iterable[str]) -> Iterator[str]:
    """One line for each filter that matches none of the output's tensors.

    Args:
        names: of all the output's tensors, and those that slices have in their sources.
    """
    wanted: tuple[str, ...] | None = None  # a million names, which most recipes do not ask for
    known: dict[str, bool] = {}
    for parameter in _parameters(recipe):
        for filter in sorted(filters(parameter.setting)):
            if filter not in known:
                wanted = tuple(names) if wanted is None else wanted
                known[filter] = any(matches(filter, name) for name in wanted)
            if not known[filter]:
                line, _ = recipe.places.get(parameter.key, (0, 0))
                place = f"{parameter.key}, line {line} of the recipe"
                yield f"{place}: the filter '{filter}' matches no tensor and has no effect"


def beyond_note(recipe: Recipe, layers: Sequence[str]) -> Iterator[str]:
    """A line on layers behind the model's last, where a gradient has to treat them somehow."""
    if layers and any(is_graded(parameter.setting) for parameter in _parameters(recipe)):
        yield (
            f"{', '.join(layers)}: behind the layers that the config counts; "
            "takes the last value of gradients"
        )


def _parameters(recipe: Recipe) -> Iterator[Parameter]:
    """Every setting, wherever it stands."""
    groups: list[Parameters] = [
        recipe.parameters,
        *(module.parameters for module in recipe.modules),
        *(piece.parameters for piece in recipe.all_slices),
        *(spec.parameters for spec in recipe.source_specs),
    ]
    return (one for group in groups for one in group.values())
