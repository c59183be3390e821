"""Spherical linear interpolation of two models. Shoemake, SIGGRAPH 1985."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from merge_cli.kernels.backend import Array
from merge_cli.kernels.reduce import dot_runs, exact_sum, weighted_sum
from merge_cli.methods.blocks import Block, TensorBlocks
from merge_cli.methods.registry import merge_method

_PARALLEL = 0.9995  # |cosine| above which sin(theta) is too small to divide by
_TINY = 1e-8


def great_circle(tensor: TensorBlocks, survey: None, *, t: float, **_: Any) -> tuple[float, float]:
    """The two coefficients of a tensor: sin((1-t)θ)/sin θ and sin(tθ)/sin θ.

    θ is the angle between the flattened tensors. Nearly parallel ones are interpolated linearly.
    """

    def products(blocks: Iterator[Block]) -> list[list[float]]:
        result: list[list[float]] = [[], [], []]
        for block in blocks:
            a, b = block.operands
            for parts, (x, y) in zip(result, ((a, a), (b, b), (a, b)), strict=True):
                parts += dot_runs(x, y)
        return result

    aa, bb, ab = (exact_sum(parts) for parts in zip(*tensor.map(products), strict=True))
    norm_a, norm_b = math.sqrt(aa), math.sqrt(bb)
    # A vector of no length has no direction; it enters the angle as it is.
    cosine = ab / ((norm_a if norm_a > _TINY else 1.0) * (norm_b if norm_b > _TINY else 1.0))
    if abs(cosine) > _PARALLEL:
        return 1.0 - t, t
    theta = math.acos(cosine)
    return math.sin((1.0 - t) * theta) / math.sin(theta), math.sin(t * theta) / math.sin(theta)


@merge_method(
    "slerp",
    paper="Shoemake 1985",
    count=(2, 2),
    base_is_source=True,
    prepare=great_circle,
    prepare_uses=("t",),
    any_array=True,
)
def slerp(
    models: list[Array],
    prepared: tuple[float, float],
    *,
    t: float = 0.5,
) -> Array:
    """Walk from the first model (the base) to the second along the great circle through both.

    Args:
        t: how far to go, for each tensor: 0 is the base, 1 the other model; what lies outside
            goes on beyond them.
    """
    return weighted_sum(prepared, models)
