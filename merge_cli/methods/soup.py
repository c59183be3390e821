"""Model soups: averaging weights. Wortsman et al., arXiv:2203.05482."""

from __future__ import annotations

import math
from collections.abc import Sequence

from merge_cli.kernels.backend import Array
from merge_cli.kernels.reduce import divided, weighted_sum
from merge_cli.methods.parameters import PerModel, each
from merge_cli.methods.registry import merge_method
from merge_cli.recipe.schema import Parameters, Recipe

_NOTHING = 1e-8  # as in mergekit: a smaller sum of weights is none


def weights_cancel(weight: Sequence[float], normalize: bool) -> str:
    """Why these weights have no average."""
    if normalize and abs(math.fsum(weight)) < _NOTHING:
        return f"the weights {list(weight)} sum to 0, so that normalizing divides by 0"
    return ""


def divisor(weight: Sequence[float]) -> float:
    """The sum of weights of task vectors, or 1 where they cancel: then the base is as good."""
    total = math.fsum(weight)
    return 1.0 if abs(total) < _NOTHING else total


def _weighs_base(recipe: Recipe, shared: Sequence[Parameters]) -> bool:
    """mergekit's `linear` averages an unlisted base with the weight that all models share."""
    return recipe.merge_method == "linear" and any("weight" in group for group in shared)


@merge_method(
    "soup",
    aliases=("linear",),
    paper="arXiv:2203.05482",
    check=weights_cancel,
    any_array=True,
    averages_base=_weighs_base,
)
def soup(
    models: list[Array],
    *,
    weight: PerModel[float] = each(1.0),
    normalize: bool = True,
) -> Array:
    """Average the models: sum of w_i * theta_i / sum of w_i.

    Args:
        weight: how much of each model goes in.
        normalize: divide by the sum of the weights.
    """
    mixed = weighted_sum(weight, models)
    return divided(mixed, math.fsum(weight)) if normalize else mixed
