"""Spherical linear interpolation of two models. Shoemake, SIGGRAPH 1985."""

from __future__ import annotations

import math
from typing import Any

from merge_cli.kernels.backend import Array
from merge_cli.kernels.fused import FusedForm
from merge_cli.kernels.reduce import weighted_sum
from merge_cli.methods.blocks import TensorBlocks
from merge_cli.methods.inner_products import along_great_circle, gram_matrix
from merge_cli.methods.registry import merge_method

_PARALLEL = 0.9995  # |cosine| above which sin(theta) is too small to divide by
_TINY = 1e-8


def coefficients(tensor: TensorBlocks, model: None, *, t: float, **_: Any) -> list[float]:
    """What the two flattened tensors are multiplied with.

    Nearly parallel ones are interpolated linearly.
    """
    gram = gram_matrix(tensor)
    norm_a, norm_b = math.sqrt(gram[0, 0]), math.sqrt(gram[1, 1])
    # A vector of no length has no direction; it enters the angle as it is.
    lengths = (norm_a if norm_a > _TINY else 1.0) * (norm_b if norm_b > _TINY else 1.0)
    cosine = float(gram[0, 1]) / lengths
    return [1.0 - t, t] if abs(cosine) > _PARALLEL else along_great_circle(cosine, t)


def fused(at: Any, prepared: list[float], **_: Any) -> FusedForm:
    """The formula as one loop."""
    return FusedForm(prepared)


@merge_method(
    "slerp",
    paper="Shoemake 1985",
    count=(2, 2),
    base_is_source=True,
    tensor_pass=coefficients,
    supports_numpy=True,
    fused=fused,
)
def slerp(
    models: list[Array],
    prepared: list[float],
    *,
    t: float = 0.5,
) -> Array:
    """Interpolate from the first model (the base) to the second along a great circle.

    Args:
        t: how far to go, for each tensor: 0 is the base, 1 the other model. Values
            outside this range extrapolate.
    """
    return weighted_sum(prepared, models)
