"""DARE: drop most of each task vector at random and rescale the rest. Yu et al., arXiv:2311.03099.

The mask of an element depends on the seed, the source, the tensor's name and the element's index
alone (see `kernels.mask`). Rescaling is exact by default: 1/density keeps the expectation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from merge_cli.kernels.mask import keep_mask
from merge_cli.kernels.reduce import ExactSum, divided, weighted_sum
from merge_cli.methods.blocks import Block, Span, TensorBlocks
from merge_cli.methods.consensus import disjoint_mean
from merge_cli.methods.parameters import Density, PerModel, each
from merge_cli.methods.registry import merge_method
from merge_cli.methods.soup import weights_cancel

if TYPE_CHECKING:
    from torch import Tensor

# true and false are mergekit's spelling: rescale, or do not.
Rescale = Literal["density", "l1", "none", True, False]


def masks(deltas: list[Tensor], at: Span, density: Sequence[float]) -> list[Tensor]:
    """m ~ Bernoulli(density) for each task vector."""
    return [
        keep_mask(at.seed, source, at.name, at.start, delta.numel(), p, delta.device)
        for delta, source, p in zip(deltas, at.sources, density, strict=True)
    ]


def drop(deltas: list[Tensor], at: Span, density: Sequence[float]) -> list[Tensor]:
    """Zero each element with probability 1 - density."""
    drawn = masks(deltas, at, density)
    return [delta.where(mask, 0.0) for delta, mask in zip(deltas, drawn, strict=True)]


def kept(block: Block, prepared: Any, parameters: Mapping[str, Any]) -> list[int]:
    """How many elements each task vector keeps in a block."""
    return [int(m.sum()) for m in masks(block.operands, block.at, parameters["density"])]


def rescale_factors(
    tensor: TensorBlocks, survey: None, *, density: Sequence[float], rescale: Rescale, **_: Any
) -> list[float]:
    """What each dropped task vector is multiplied by.

    1/density; or, for `l1`, its L1 norm before over its L1 norm after, as mergekit does (0 where
    nothing survived).
    """
    if rescale in ("density", True):
        return [1.0 / p for p in density]
    if rescale in ("none", False):
        return [1.0] * len(density)
    before = [ExactSum() for _ in density]
    after = [ExactSum() for _ in density]
    for block in tensor.blocks():
        for i, dropped in enumerate(drop(block.operands, block.at, density)):
            before[i].add(block.operands[i].abs())
            after[i].add(dropped.abs())
    return [b.value / a.value if a.value else 0.0 for b, a in zip(before, after, strict=True)]


def _scaled(weight: Sequence[float], factors: list[float]) -> list[float]:
    return [w * factor for w, factor in zip(weight, factors, strict=True)]


@merge_method(
    "dare", aliases=("dare_linear",), paper="arXiv:2311.03099",
    prepare=rescale_factors, kept=kept, check=weights_cancel,
)  # fmt: skip
def dare(
    base: Tensor,
    deltas: list[Tensor],
    at: Span,
    prepared: list[float],
    *,
    weight: PerModel[float] = each(1.0),
    density: PerModel[Density] = each(1.0),
    rescale: Rescale = "density",
    normalize: bool = False,
    lambda_: float = 1.0,
) -> Tensor:
    """Drop a random share of each task vector, rescale the rest, add them to the base.

    Args:
        weight: how much of each task vector goes in.
        density: the chance of each element to be kept.
        rescale: multiply what is kept by 1/density (`density`, or true), by its L1 norm before
            over after (`l1`, mergekit's rule), or not at all (`none`, or false).
        normalize: divide the sum by the sum of the weights.
        lambda_: scale of the whole change.
    """
    mixed = weighted_sum(_scaled(weight, prepared), drop(deltas, at, density))
    if normalize:
        mixed = divided(mixed, sum(weight))
    return base + lambda_ * mixed


@merge_method("dare_ties", paper="arXiv:2311.03099", prepare=rescale_factors, kept=kept)
def dare_ties(
    base: Tensor,
    deltas: list[Tensor],
    at: Span,
    prepared: list[float],
    *,
    weight: PerModel[float] = each(1.0),
    density: PerModel[Density] = each(1.0),
    rescale: Rescale = "density",
    normalize: bool = False,
    lambda_: float = 1.0,
    elect: Literal["weighted", "unweighted"] = "weighted",
) -> Tensor:
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
    rescaled = [d * f for d, f in zip(drop(deltas, at, density), prepared, strict=True)]
    mixed = disjoint_mean(
        rescaled,
        weight,
        weighted_election=elect == "weighted",
        divide_by="weights" if normalize else "nothing",
    )
    return base + lambda_ * mixed
