"""Model Breadcrumbs: drop the smallest changes, and the very largest. arXiv:2312.06795.

Of a task vector's n elements the int(gamma * n) largest are dropped, then the int(density * n) next
ones are kept. Equal magnitudes are ranked by index, the lower the larger.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merge_cli.kernels.backend import Array
from merge_cli.kernels.cut import MagnitudeThreshold, count_kept, trimmed
from merge_cli.kernels.elect import disjoint_mean
from merge_cli.kernels.reduce import add_scaled, divided, weighted_sum
from merge_cli.kernels.select import exact_cuts, kept_count
from merge_cli.methods.blocks import Block, RowStream, Span, TensorBlocks
from merge_cli.methods.parameters import CappedShare, Density, PerModel, each
from merge_cli.methods.registry import merge_method
from merge_cli.methods.rescaling import RescaleL1, l1_factors, rescaled
from merge_cli.methods.soup import divisor

# For each task vector: what is kept of it and the outliers, and the outliers alone.
Cuts = tuple[list[MagnitudeThreshold | None], list[MagnitudeThreshold | None]]


@dataclass(frozen=True)
class Middle:
    """What is kept of each task vector of a tensor, and what that is multiplied by."""

    cuts: Cuts
    factors: list[float]


def find_cuts(
    tensor: TensorBlocks,
    survey: None,
    *,
    density: Sequence[float],
    gamma: Sequence[float],
    rescale: RescaleL1,
    **_: Any,
) -> Middle:
    """The two cuts of each task vector; at density 1 nothing is dropped."""
    size = tensor.size
    kept = [kept_count(share, size) for share in density]
    # What is kept wins: fewer outliers go where both do not fit.
    outliers = [
        min(kept_count(share, size), size - keep) for share, keep in zip(gamma, kept, strict=True)
    ]
    counts = [a + b for a, b in zip(kept, outliers, strict=True)]
    stream = RowStream(tensor, lambda block: [*block.operands, *block.operands])
    result = exact_cuts([*counts, *outliers], stream)
    cuts = result[: len(counts)], result[len(counts) :]

    def trim(deltas: list[Array], start: int) -> list[Array]:
        return _between(deltas, cuts, start)

    return Middle(cuts, l1_factors(tensor, density, rescale, trim))


def _between(deltas: list[Array], cuts: Cuts, start: int) -> list[Array]:
    whole, outliers = (trimmed(deltas, part, start) for part in cuts)
    # An outlier less itself is 0, and nothing else is touched.
    return [
        kept
        if cut is not None and cut.last_tie == -1 and cut.threshold == float("inf")
        else kept - out
        for kept, out, cut in zip(whole, outliers, cuts[1], strict=True)
    ]


def _middle(deltas: list[Array], prepared: Middle, start: int) -> list[Array]:
    return rescaled(_between(deltas, prepared.cuts, start), prepared.factors)


def kept(block: Block, prepared: Middle, parameters: Mapping[str, Any]) -> list[int]:
    """How many elements of each task vector are kept in a block."""
    start = block.at.start
    return [
        count_kept(delta, whole, start) - count_kept(delta, outliers, start)
        for delta, whole, outliers in zip(block.operands, *prepared.cuts, strict=True)
    ]


_SHARED: dict[str, Any] = {
    "paper": "arXiv:2312.06795",
    "prepare": find_cuts,
    "kept": kept,
    "prepare_uses": ("density", "gamma", "rescale"),
    "any_array": True,
}


@merge_method("breadcrumbs", **_SHARED)
def breadcrumbs(
    base: Array,
    deltas: list[Array],
    at: Span,
    prepared: Middle,
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
    mixed = weighted_sum(weight, _middle(deltas, prepared, at.start))
    if normalize:
        mixed = divided(mixed, divisor(weight))
    return add_scaled(base, lambda_, mixed)


@merge_method("breadcrumbs_ties", **_SHARED)
def breadcrumbs_ties(
    base: Array,
    deltas: list[Array],
    at: Span,
    prepared: Middle,
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
    mixed = disjoint_mean(
        _middle(deltas, prepared, at.start),
        weight,
        weighted_election=True,
        divide_by="weights" if normalize else "nothing",
    )
    return add_scaled(base, lambda_, mixed)
