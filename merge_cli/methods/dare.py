"""DARE: drop most of each task vector at random and rescale the rest. Yu et al., arXiv:2311.03099.

The mask of an element depends on the seed, the source, the tensor's name and the element's index
alone (see `kernels.mask`). Rescaling is exact by default: 1/density keeps the expectation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from merge_cli.kernels.backend import Array
from merge_cli.kernels.elect import disjoint_mean
from merge_cli.kernels.mask import count_kept, drop
from merge_cli.kernels.reduce import absolute_runs, add_scaled, divided, exact_sum, weighted_sum
from merge_cli.methods.blocks import Block, Span, TensorBlocks
from merge_cli.methods.parameters import Density, PerModel, each
from merge_cli.methods.registry import merge_method
from merge_cli.methods.soup import divisor

# true and false are mergekit's spelling: rescale, or do not.
Rescale = Literal["density", "l1", "none", True, False]


def dropped(
    deltas: list[Array], at: Span, density: Sequence[float], factors: Sequence[float] | None = None
) -> list[Array]:
    """Zero each element with probability 1 - density, multiply the others by the factor."""
    return drop(deltas, at.seed, at.sources, at.name, at.start, density, factors)


def kept(block: Block, prepared: Any, parameters: Mapping[str, Any]) -> list[int]:
    """How many elements each task vector keeps in a block."""
    at, density = block.at, parameters["density"]
    return count_kept(block.operands, at.seed, at.sources, at.name, at.start, density)


def rescale_factors(
    tensor: TensorBlocks, survey: None, *, density: Sequence[float], rescale: Rescale, **_: Any
) -> list[float]:
    """What each dropped task vector is multiplied by.

    1/density (0 where nothing is kept); or, for `l1`, its L1 norm before over its L1 norm after, as
    mergekit does (0 where nothing survived).
    """
    if rescale in ("density", True):
        return [1.0 / p if p else 0.0 for p in density]
    if rescale in ("none", False):
        return [1.0] * len(density)

    def sums(blocks: Iterator[Block]) -> list[list[float]]:
        result: list[list[float]] = [[] for _ in range(2 * len(density))]
        for block in blocks:
            everything = [*block.operands, *dropped(block.operands, block.at, density)]
            for parts, array in zip(result, everything, strict=True):
                parts += absolute_runs(array)
        return result

    norms = [exact_sum(parts) for parts in zip(*tensor.map(sums), strict=True)]
    before, after = norms[: len(density)], norms[len(density) :]
    return [b / a if a else 0.0 for b, a in zip(before, after, strict=True)]


def _scaled(weight: Sequence[float], factors: list[float]) -> list[float]:
    return [w * factor for w, factor in zip(weight, factors, strict=True)]


@merge_method(
    "dare",
    aliases=("dare_linear",),
    paper="arXiv:2311.03099",
    prepare=rescale_factors,
    prepare_uses=("density", "rescale"),
    kept=kept,
    any_array=True,
)
def dare(
    base: Array,
    deltas: list[Array],
    at: Span,
    prepared: list[float],
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
    mixed = weighted_sum(_scaled(weight, prepared), dropped(deltas, at, density))
    if normalize:
        mixed = divided(mixed, divisor(weight))
    return add_scaled(base, lambda_, mixed)


@merge_method(
    "dare_ties",
    paper="arXiv:2311.03099",
    prepare=rescale_factors,
    prepare_uses=("density", "rescale"),
    kept=kept,
    any_array=True,
)
def dare_ties(
    base: Array,
    deltas: list[Array],
    at: Span,
    prepared: list[float],
    *,
    weight: PerModel[float] = each(1.0),
    density: PerModel[Density] = each(1.0),
    rescale: Rescale = "density",
    normalize: bool = False,
    lambda_: float = 1.0,
    elect: Literal["weighted", "unweighted"] = "weighted",
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
    rescaled = dropped(deltas, at, density, prepared)
    mixed = disjoint_mean(
        rescaled,
        weight,
        weighted_election=elect == "weighted",
        divide_by="weights" if normalize else "nothing",
    )
    return add_scaled(base, lambda_, mixed)
