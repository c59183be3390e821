"""Model soups: averaging weights. Wortsman et al., arXiv:2203.05482."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any

from merge_cli.kernels.backend import Array
from merge_cli.kernels.fused import FusedForm
from merge_cli.methods.consensus import linear_sum, weights_cancel
from merge_cli.methods.parameters import PerModel, Range, each
from merge_cli.methods.registry import merge_method
from merge_cli.recipe.schema import Parameters, Recipe


def _weighs_base(recipe: Recipe, shared: Sequence[Parameters]) -> bool:
    """mergekit's `linear` averages an unlisted base with the weight that all models share."""
    return recipe.merge_method == "linear" and any("weight" in group for group in shared)


def _no_average(weight: Sequence[float], normalize: bool, divisor: float | None) -> str:
    return weights_cancel(weight, normalize and divisor is None)


def _divisor(weight: Sequence[float], normalize: bool, divisor: float | None) -> float:
    """What the weighted sum is divided by."""
    if divisor is not None:
        return divisor
    return math.fsum(weight) if normalize else 1.0


def fused(
    at: Any, prepared: None, *, weight: Sequence[float], normalize: bool, divisor: float | None
) -> FusedForm:
    """The formula as one loop."""
    return FusedForm(weight, _divisor(weight, normalize, divisor))


@merge_method(
    "soup",
    aliases=("linear",),
    paper="arXiv:2203.05482",
    check=_no_average,
    supports_numpy=True,
    fused=fused,
    averages_base=_weighs_base,
)
def soup(
    models: list[Array],
    *,
    weight: PerModel[float] = each(1.0),
    normalize: bool = True,
    divisor: Annotated[float | None, Range(0, above=True)] = None,
) -> Array:
    """Average the models: sum of w_i * theta_i / sum of w_i.

    Args:
        weight: how much of each model goes in.
        normalize: divide by the sum of the weights.
        divisor: divide by this number instead, as where a model is a sum itself.
    """
    return linear_sum(weight, models, _divisor(weight, normalize, divisor))
