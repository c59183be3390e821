"""DELLA: drop at random, the small changes more often than the large ones. arXiv:2406.11617.

Within each row of a task vector the elements are ranked by magnitude; an element of rank r among n
is kept with the chance p = density - epsilon + 2 epsilon r / (n-1), and what is kept is multiplied
by 1/p. Ranks are exact; of equal magnitudes the lower index is the larger. The mask depends on
seed, source, tensor and element alone, as DARE's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from merge_cli.kernels.reduce import add_scaled
from merge_cli.methods.blocks import Span, TensorBlocks
from merge_cli.methods.consensus import disjoint_merge, divisor_of, linear_sum
from merge_cli.methods.parameters import Density, PerModel, Range, each
from merge_cli.methods.ranked_drop import RankedDrop, ranked_drop
from merge_cli.methods.registry import merge_method
from merge_cli.methods.sparsification import Rescale

if TYPE_CHECKING:
    from torch import Tensor

Epsilon = Annotated[float, Range(0.0, 0.5)]


def rank(
    tensor: TensorBlocks,
    model: None,
    *,
    density: Sequence[float],
    epsilon: Sequence[float],
    rescale: Rescale,
    **_: Any,
) -> RankedDrop:
    """The ranks of every task vector, which is held whole for it."""
    return ranked_drop(tensor, density, epsilon, rescale)


def chances_fit(density: Sequence[float], epsilon: Sequence[float]) -> str:
    """Why these are no chances; empty when they are."""
    for share, spread in zip(density, epsilon, strict=True):
        if 0.0 < share < 1.0 and not (share - spread >= 0.0 and share + spread <= 1.0):
            message = f"density {share:g} with epsilon {spread:g}: density - epsilon and "
            return message + "density + epsilon must lie in [0, 1]"
    return ""


_SHARED: dict[str, Any] = {
    "paper": "arXiv:2406.11617",
    "tensor_pass": rank,
    "extra_memory": lambda **_: 8,
}


@merge_method("della", check=chances_fit, **_SHARED)
def della(
    base: Tensor,
    deltas: list[Tensor],
    at: Span,
    prepared: RankedDrop,
    *,
    weight: PerModel[float] = each(1.0),
    density: PerModel[Density] = each(1.0),
    epsilon: PerModel[Epsilon] = each(0.15),
    rescale: Rescale = "density",
    normalize: bool = True,
    lambda_: float = 1.0,
) -> Tensor:
    """Drop small changes more often than large ones, then elect signs and average what agrees.

    Args:
        weight: how much of each task vector goes in.
        density: the mean chance of an element to be kept; 1 keeps all.
        epsilon: the chance is from density - epsilon (a row's smallest) to density + epsilon.
        rescale: multiply what is kept by 1/chance (`density`, or true), by its L1 norm before over
            after (`l1`, mergekit's rule), or not at all (`none`, or false).
        normalize: divide each element by the sum of the weights that agree.
        lambda_: scale of the whole change.
    """
    mixed = disjoint_merge(weight, prepared.apply(deltas, at), normalize=normalize)
    merged: Tensor = add_scaled(base, lambda_, mixed)
    return merged


@merge_method("della_linear", check=chances_fit, **_SHARED)
def della_linear(
    base: Tensor,
    deltas: list[Tensor],
    at: Span,
    prepared: RankedDrop,
    *,
    weight: PerModel[float] = each(1.0),
    density: PerModel[Density] = each(1.0),
    epsilon: PerModel[Epsilon] = each(0.15),
    rescale: Rescale = "density",
    normalize: bool = False,
    lambda_: float = 1.0,
) -> Tensor:
    """Drop small changes more often than large ones, rescale the rest, add them to the base.

    Args:
        weight: how much of each task vector goes in.
        density: the mean chance of an element to be kept; 1 keeps all.
        epsilon: the chance is from density - epsilon (a row's smallest) to density + epsilon.
        rescale: multiply what is kept by 1/chance (`density`, or true), by its L1 norm before over
            after (`l1`, mergekit's rule), or not at all (`none`, or false).
        normalize: divide the sum by the sum of the weights, or by 1 where they cancel.
        lambda_: scale of the whole change.
    """
    mixed = linear_sum(weight, prepared.apply(deltas, at), divisor_of(weight, normalize))
    merged: Tensor = add_scaled(base, lambda_, mixed)
    return merged
