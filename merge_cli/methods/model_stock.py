"""Model Stock: how far to go from the base to the average, by the angle between task vectors.

Jang et al., arXiv:2403.19522: t = K cos θ / (1 + (K-1) cos θ), merged = t * average + (1-t) * base.
"""

from __future__ import annotations

import math
from typing import Any

from merge_cli.kernels.backend import Array
from merge_cli.kernels.reduce import weighted_sum
from merge_cli.methods.blocks import Span, TensorBlocks
from merge_cli.methods.inner_products import SliceCoefficients, gram_matrices, gram_matrix
from merge_cli.methods.registry import merge_method

_SINGULAR = 1e-6
_SHORTEST = 1e-6  # of a product of lengths, as in mergekit: an untouched tensor has no angle
Prepared = list[float] | SliceCoefficients


def interpolation(tensor: TensorBlocks, model: None, *, filter_wise: bool, **_: Any) -> Prepared:
    """What each task vector is multiplied with: t / K, of the tensor or of each of its rows."""
    import numpy as np

    if not filter_wise:
        return _shares(gram_matrix(tensor))
    grams = gram_matrices(tensor, "rows")
    return SliceCoefficients(np.array([_shares(gram) for gram in grams]), tensor.shape, "rows")


def _shares(gram: Any) -> list[float]:
    count = len(gram)
    cosines = [
        min(max(gram[i, j] / max(math.sqrt(gram[i, i] * gram[j, j]), _SHORTEST), -1.0), 1.0)
        for i in range(count)
        for j in range(i + 1, count)
    ]
    cosine = math.fsum(cosines) / len(cosines)
    below = 1.0 + (count - 1) * cosine
    t = 0.0 if abs(below) < _SINGULAR else count * cosine / below
    return [t / count] * count


@merge_method(
    "model_stock",
    paper="arXiv:2403.19522",
    count=(2, None),
    tensor_pass=interpolation,
    supports_numpy=True,
    extra_memory=lambda *, filter_wise, **_: 6 if filter_wise else 0,
)
def model_stock(
    base: Array,
    deltas: list[Array],
    at: Span,
    prepared: Prepared,
    *,
    filter_wise: bool = False,
) -> Array:
    """Go from the base towards the average of the models, the further the more they agree.

    Args:
        filter_wise: an angle for each row of a tensor instead of one for the tensor.
    """
    if isinstance(prepared, SliceCoefficients):
        return base + prepared.sum_of(deltas, at.start)
    return base + weighted_sum(prepared, deltas)
