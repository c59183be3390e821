"""Model Breadcrumbs: drop the smallest changes, and the very largest. arXiv:2312.06795.

Of a task vector's n elements the int(gamma * n) largest are dropped, then the int(density * n) next
ones are kept. Equal magnitudes are ranked by index, the lower the larger.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from merge_cli.kernels.backend import Array
from merge_cli.kernels.reduce import add_scaled
from merge_cli.methods.blocks import Span, TensorBlocks
from merge_cli.methods.consensus import disjoint_merge, divisor_of, linear_sum
from merge_cli.methods.parameters import CappedShare, Density, PerModel, each
from merge_cli.methods.registry import merge_method
from merge_cli.methods.sparsification import MiddleBand, RescaleL1, count_kept, middle_band


def decide(
    tensor: TensorBlocks,
    model: None,
    *,
    density: Sequence[float],
    gamma: Sequence[float],
    rescale: RescaleL1,
    **_: Any,
) -> MiddleBand:
    """The two cuts of each task vector."""
    return middle_band(tensor, density, gamma, rescale)


_SHARED: dict[str, Any] = {
    "paper": "arXiv:2312.06795",
    "tensor_pass": decide,
    "count_kept": count_kept,
    "ranks_magnitudes": True,
    "supports_numpy": True,
}


@merge_method("breadcrumbs", **_SHARED)
def breadcrumbs(
    base: Array,
    deltas: list[Array],
    at: Span,
    prepared: MiddleBand,
    *,
    weight: PerModel[float] = each(1.0),
    density: PerModel[Density] = each(1.0),
    gamma: PerModel[CappedShare] = each(0.01),
    normalize: bool = False,
    rescale: RescaleL1 = False,
    lambda_: float = 1.0,
) -> Array:
    """Keep each task vector's middle: neither its smallest changes nor its largest outliers.

    Args:
        weight: how much of each task vector goes in.
        density: share of its elements that is kept; 1 keeps all, outliers too.
        gamma: share of its elements, the largest, that is dropped.
        normalize: divide the sum by the sum of the weights, or by 1 where they cancel.
        rescale: multiply what is kept by its L1 norm before over after (`l1`, or true).
        lambda_: scale of the whole change.
    """
    mixed = linear_sum(weight, prepared.apply(deltas, at), divisor_of(weight, normalize))
    return add_scaled(base, lambda_, mixed)


@merge_method("breadcrumbs_ties", **_SHARED)
def breadcrumbs_ties(
    base: Array,
    deltas: list[Array],
    at: Span,
    prepared: MiddleBand,
    *,
    weight: PerModel[float] = each(1.0),
    density: PerModel[Density] = each(1.0),
    gamma: PerModel[CappedShare] = each(0.01),
    normalize: bool = False,
    rescale: RescaleL1 = False,
    lambda_: float = 1.0,
) -> Array:
    """Keep each task vector's middle, then elect signs and average what agrees, as TIES does.

    Args:
        weight: how much of each task vector goes in.
        density: share of its elements that is kept; 1 keeps all, outliers too.
        gamma: share of its elements, the largest, that is dropped.
        normalize: divide each element by the sum of the weights that agree.
        rescale: multiply what is kept by its L1 norm before over after (`l1`, or true).
        lambda_: scale of the whole change.
    """
    mixed = disjoint_merge(weight, prepared.apply(deltas, at), normalize=normalize)
    return add_scaled(base, lambda_, mixed)
