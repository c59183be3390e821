"""DARE: drop most of each task vector at random and rescale the rest. Yu et al., arXiv:2311.03099.

Rescaling is exact by default: 1/density keeps the expectation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from merge_cli.kernels.backend import Array
from merge_cli.kernels.fused import Election, FusedForm
from merge_cli.kernels.reduce import add_scaled
from merge_cli.methods.blocks import Span, TensorBlocks
from merge_cli.methods.consensus import Elect, disjoint_merge, divisor_of, linear_sum
from merge_cli.methods.parameters import Density, PerModel, each
from merge_cli.methods.registry import merge_method
from merge_cli.methods.sparsification import (
    RandomDrop,
    Rescale,
    count_kept,
    drop_by_density,
    random_drop,
)


def decide(
    tensor: TensorBlocks, model: None, *, density: Sequence[float], rescale: Rescale, **_: Any
) -> RandomDrop:
    """The masks' chances and factors."""
    return random_drop(tensor, density, rescale)


def _unread(density: Sequence[float], rescale: Rescale) -> RandomDrop | None:
    """`decide`, where it needs no norms."""
    return None if rescale == "l1" else drop_by_density(density, rescale)


_SHARED: dict[str, Any] = {
    "paper": "arXiv:2311.03099",
    "tensor_pass": decide,
    "count_kept": count_kept,
    "supports_numpy": True,
}


def fused(
    at: Span,
    prepared: RandomDrop,
    *,
    weight: Sequence[float],
    normalize: bool,
    lambda_: float,
    **_: Any,
) -> FusedForm:
    """DARE's formula as one loop."""
    masks, factored = prepared.factored_out(weight)
    return FusedForm(factored, divisor_of(weight, normalize), lambda_, masks.masks(at))


def fused_ties(
    at: Span,
    prepared: RandomDrop,
    *,
    weight: Sequence[float],
    normalize: bool,
    lambda_: float,
    elect: Elect,
    **_: Any,
) -> FusedForm:
    """dare_ties's formula as one loop."""
    election = Election(elect == "weighted", "weights" if normalize else "nothing")
    return FusedForm(
        weight,
        scale=lambda_,
        drop=prepared.masks(at),
        factors=prepared.factors,
        election=election,
    )


def fused_unread(
    at: Span, size: int | None, model: None, *, density: Any, rescale: Rescale, **parameters: Any
) -> FusedForm | None:
    """The same before the tensor is read."""
    prepared = _unread(density, rescale)
    return None if prepared is None else fused(at, prepared, **parameters)


def fused_ties_unread(
    at: Span, size: int | None, model: None, *, density: Any, rescale: Rescale, **parameters: Any
) -> FusedForm | None:
    """dare_ties's before the tensor is read."""
    prepared = _unread(density, rescale)
    return None if prepared is None else fused_ties(at, prepared, **parameters)


@merge_method("dare", aliases=("dare_linear",), fused=fused, fused_unread=fused_unread, **_SHARED)
def dare(
    base: Array,
    deltas: list[Array],
    at: Span,
    prepared: RandomDrop,
    *,
    weight: PerModel[float] = each(1.0),
    density: PerModel[Density] = each(1.0),
    rescale: Rescale = "density",
    normalize: bool = False,
    lambda_: float = 1.0,
) -> Array:
    """Drop a random share of each task vector, rescale the rest, add them to the base.

    Args:
        weight: how much of each task vector goes in.
        density: the chance of each element to be kept.
        rescale: multiply what is kept by 1/density (`density`, or true), by its L1 norm before
            over after (`l1`, mergekit's rule), or not at all (`none`, or false).
        normalize: divide the sum by the sum of the weights, or by 1 where they cancel.
        lambda_: scale of the whole change.
    """
    masks, factored = prepared.factored_out(weight)
    mixed = linear_sum(factored, masks.apply(deltas, at), divisor_of(weight, normalize))
    return add_scaled(base, lambda_, mixed)


@merge_method("dare_ties", fused=fused_ties, fused_unread=fused_ties_unread, **_SHARED)
def dare_ties(
    base: Array,
    deltas: list[Array],
    at: Span,
    prepared: RandomDrop,
    *,
    weight: PerModel[float] = each(1.0),
    density: PerModel[Density] = each(1.0),
    rescale: Rescale = "density",
    normalize: bool = False,
    lambda_: float = 1.0,
    elect: Elect = "weighted",
) -> Array:
    """Drop at random and rescale, then elect signs and average what agrees, as TIES does.

    Args:
        weight: how much of each task vector goes in.
        density: the chance of each element to be kept.
        rescale: multiply what is kept by 1/density (`density`, or true), by its L1 norm before
            over after (`l1`, mergekit's rule), or not at all (`none`, or false).
        normalize: divide each element by the sum of the weights that agree.
        lambda_: scale of the whole change.
        elect: elect the sign of the weighted or of the unweighted sum.
    """
    dropped = prepared.apply(deltas, at)
    mixed = disjoint_merge(weight, dropped, normalize=normalize, elect=elect)
    return add_scaled(base, lambda_, mixed)
