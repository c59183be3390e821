"""Multi-SLERP: the weighted mean of directions, at the weighted mean of lengths. mergekit's own.

As mergekit describes it: project onto the tangent space at the normalised mean m of the unit
vectors u_i, interpolate there, project back. The weighted sum of the tangents is
sum of w_i (u_i - <u_i, m> m), and with m proportional to the sum of w_i u_i that is 0 whatever the
vectors: the way back leads to m itself. So this computes m, without the rounding errors of 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from merge_cli.kernels.backend import Array
from merge_cli.kernels.reduce import weighted_sum
from merge_cli.methods.blocks import TensorBlocks
from merge_cli.methods.consensus import weights_cancel
from merge_cli.methods.inner_products import gram_matrix
from merge_cli.methods.method import Method
from merge_cli.methods.parameters import PerModel, each
from merge_cli.methods.registry import merge_method, method_of
from merge_cli.recipe.schema import Recipe

_BALANCED = 1e-8  # a mean of unit vectors this short has no direction


def mean_direction(
    tensor: TensorBlocks,
    model: None,
    *,
    weight: Sequence[float],
    normalize_weights: bool,
    **_: Any,
) -> list[float]:
    """What each operand is multiplied with."""
    import numpy as np

    if len(weight) == 1:
        return [1.0]
    gram = gram_matrix(tensor)
    lengths = np.sqrt(np.diag(gram))
    weights = np.array(weight) / (math.fsum(weight) if normalize_weights else 1.0)
    per_unit = np.divide(weights, lengths, out=np.zeros_like(lengths), where=lengths > 0)
    length = math.sqrt(max(float(per_unit @ gram @ per_unit), 0.0))
    if length < _BALANCED:  # opposites: the straight line between them
        return list(weights.tolist())
    scale = float(lengths @ weights) / length
    return list((scale * per_unit).tolist())


def _variant(recipe: Recipe) -> Method | None:
    return method_of(multislerp_of_changes) if recipe.base_model else None


def _check(weight: Sequence[float], normalize_weights: bool) -> str:
    # One alone has nothing to be weighed against: it is the result.
    return weights_cancel(weight, normalize_weights) if len(weight) > 1 else ""


@merge_method(
    "multislerp",
    tensor_pass=mean_direction,
    resolve_variant=_variant,
    check=_check,
    supports_numpy=True,
)
def multislerp(
    models: list[Array],
    prepared: list[float],
    *,
    weight: PerModel[float] = each(1.0),
    normalize_weights: bool = True,
) -> Array:
    """Average directions and lengths of the models apart; with a base, of the task vectors.

    Args:
        weight: how much of each goes in.
        normalize_weights: divide the weights by their sum.
    """
    return weighted_sum(prepared, models)


@merge_method(
    "multislerp",
    tensor_pass=mean_direction,
    check=_check,
    supports_numpy=True,
    listed=False,
)
def multislerp_of_changes(
    base: Array,
    deltas: list[Array],
    prepared: list[float],
    *,
    weight: PerModel[float] = each(1.0),
    normalize_weights: bool = True,
) -> Array:
    """Average directions and lengths of the task vectors apart, and add that to the base.

    Args:
        weight: how much of each goes in.
        normalize_weights: divide the weights by their sum.
    """
    return base + weighted_sum(prepared, deltas)
