"""NuSLERP: spherical interpolation of two models, or of two task vectors, by their weights.

mergekit's own method. As a whole, the flattened tensors are interpolated; otherwise each row, or
each column, is a vector of its own.
"""

from __future__ import annotations

import math
from typing import Any

from merge_cli.kernels.backend import Array
from merge_cli.kernels.reduce import weighted_sum
from merge_cli.methods.blocks import Span, TensorBlocks
from merge_cli.methods.inner_products import (
    Along,
    SliceCoefficients,
    along_great_circle,
    gram_matrices,
    gram_matrix,
)
from merge_cli.methods.method import Method
from merge_cli.methods.parameters import PerModel, each
from merge_cli.methods.registry import merge_method, method_of
from merge_cli.recipe.schema import Recipe

_PARALLEL = 1e-16  # of sin^2: below it the two are on one line
_NO_WEIGHT = 1e-6
Prepared = list[float] | SliceCoefficients


def coefficients(
    tensor: TensorBlocks,
    model: None,
    *,
    weight: list[float],
    nuslerp_flatten: bool,
    nuslerp_row_wise: bool,
    **_: Any,
) -> Prepared:
    """sin((1-t)θ)/sin θ and sin(tθ)/sin θ, for the whole tensor or for each row or column."""
    import numpy as np

    total = math.fsum(weight)
    t = 0.5 if abs(total) < _NO_WEIGHT else weight[1] / total
    if nuslerp_flatten:
        return _coefficients(t, gram_matrix(tensor))
    along: Along = "columns" if nuslerp_row_wise and len(tensor.shape) > 1 else "rows"
    grams = gram_matrices(tensor, along)
    result = np.array([_coefficients(t, gram) for gram in grams])
    return SliceCoefficients(result.reshape(len(grams), 2), tensor.shape, along)


def _coefficients(t: float, gram: Any) -> list[float]:
    norms = math.sqrt(gram[0, 0]) * math.sqrt(gram[1, 1])
    cosine = min(max(gram[0, 1] / norms, -1.0), 1.0) if norms else 0.0
    if 1.0 - cosine * cosine <= _PARALLEL:
        return [1.0 - t, t]
    return along_great_circle(cosine, t)


def _sum(prepared: Prepared, operands: list[Array], start: int) -> Array:
    if isinstance(prepared, SliceCoefficients):
        return prepared.sum_of(operands, start)
    return weighted_sum(prepared, operands)


def _whole(*, nuslerp_flatten: bool, **_: Any) -> int:
    return 0 if nuslerp_flatten else 6


def _variant(recipe: Recipe) -> Method | None:
    return method_of(nuslerp_of_changes) if recipe.base_model else None


@merge_method(
    "nuslerp",
    count=(2, 2),
    tensor_pass=coefficients,
    resolve_variant=_variant,
    supports_numpy=True,
    extra_memory=_whole,
)
def nuslerp(
    models: list[Array],
    at: Span,
    prepared: Prepared,
    *,
    weight: PerModel[float] = each(1.0),
    nuslerp_flatten: bool = True,
    nuslerp_row_wise: bool = False,
) -> Array:
    """Interpolate two models along a great circle; with a base, two task vectors.

    Args:
        weight: the second one's share of the sum of both is how far to go.
        nuslerp_flatten: a tensor is one vector; otherwise each of its rows is.
        nuslerp_row_wise: without flatten, each column instead (mergekit's name for it).
    """
    return _sum(prepared, models, at.start)


@merge_method(
    "nuslerp",
    count=(2, 2),
    tensor_pass=coefficients,
    supports_numpy=True,
    extra_memory=_whole,
    listed=False,
)
def nuslerp_of_changes(
    base: Array,
    deltas: list[Array],
    at: Span,
    prepared: Prepared,
    *,
    weight: PerModel[float] = each(1.0),
    nuslerp_flatten: bool = True,
    nuslerp_row_wise: bool = False,
) -> Array:
    """Interpolate two task vectors along a great circle, and add the result to the base.

    Args:
        weight: the second one's share of the sum of both is how far to go.
        nuslerp_flatten: a tensor is one vector; otherwise each of its rows is.
        nuslerp_row_wise: without flatten, each column instead (mergekit's name for it).
    """
    return base + _sum(prepared, deltas, at.start)
