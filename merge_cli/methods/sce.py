"""SCE: select, calculate, erase. Wan et al. (FuseChat), arXiv:2408.07990.

1. Select the elements in which the task vectors differ most among the models (variance).
2. Calculate a weight for each model: the share of its task vector in the sum of squares.
3. Erase what has another sign than the sum of all task vectors.

Then the mean of what is left by those weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from merge_cli.kernels.cut import MagnitudeThreshold
from merge_cli.kernels.reduce import dot_runs, exact_sum
from merge_cli.kernels.select import exact_cuts, kept_count
from merge_cli.methods.blocks import Block, RowStream, Span, TensorBlocks
from merge_cli.methods.parameters import CappedShare
from merge_cli.methods.registry import merge_method

if TYPE_CHECKING:
    from torch import Tensor

_NOTHING = 1e-6  # as in mergekit: below it weights are equal, and a divisor is this


@dataclass(frozen=True)
class Selected:
    """What a tensor is merged with: the cut of its variances (None keeps all), and the weights."""

    cut: MagnitudeThreshold | None
    weights: list[float]


def select(tensor: TensorBlocks, survey: None, *, select_topk: float, **_: Any) -> Selected:
    """Steps 1 and 2, in streamed passes."""
    cut = None
    if select_topk < 1.0:
        stream = RowStream(tensor, lambda block: [_variance(block.operands)])

        def differing(rows: Iterator[list[Any]]) -> int:
            return sum(int((row != 0).sum()) for (row,) in rows)

        kept = kept_count(select_topk, sum(stream.map(differing)))
        (cut,) = exact_cuts([kept], stream)

    def squares(blocks: Iterator[Block]) -> list[list[float]]:
        result: list[list[float]] = []
        for block in blocks:
            deltas = _selected(block.operands, cut, block.at.start)
            result = result or [[] for _ in deltas]
            for parts, delta in zip(result, deltas, strict=True):
                parts += dot_runs(delta, delta)
        return result

    sums = [exact_sum(parts) / tensor.size for parts in zip(*tensor.map(squares), strict=True)]
    whole = math.fsum(sums)
    if whole < _NOTHING:
        return Selected(cut, [1.0 / len(sums)] * len(sums))
    return Selected(cut, [item / whole for item in sums])


def _variance(deltas: list[Tensor]) -> Tensor:
    """Over the models, of each element; added up in their order."""
    mean = deltas[0].clone()
    for delta in deltas[1:]:
        mean += delta
    mean /= len(deltas)
    total = (deltas[0] - mean).square()
    for delta in deltas[1:]:
        total += (delta - mean).square()
    return total / len(deltas)


def _selected(deltas: list[Tensor], cut: MagnitudeThreshold | None, start: int) -> list[Tensor]:
    if cut is None:
        return deltas
    keep = cut.keep(_variance(deltas), start)
    return [delta.where(keep, 0.0) for delta in deltas]


@merge_method("sce", paper="arXiv:2408.07990", prepare=select, prepare_uses=("select_topk",))
def sce(
    base: Tensor,
    deltas: list[Tensor],
    at: Span,
    prepared: Selected,
    *,
    select_topk: CappedShare = 1.0,
) -> Tensor:
    """Keep the elements that differ most, weigh models by their changes, erase minority signs.

    Args:
        select_topk: share of the elements that are kept, of those that differ at all; exactly
            int(select_topk * n), ties to the lower index.
    """
    import torch

    kept = _selected(deltas, prepared.cut, at.start)
    elected = kept[0].clone()
    for delta in kept[1:]:
        elected += delta
    sign = torch.where(elected >= 0, 1.0, -1.0)
    total, divisor = torch.zeros_like(base), torch.zeros_like(base)
    for delta, weight in zip(kept, prepared.weights, strict=True):
        agrees = delta * sign > 0
        total += torch.where(agrees, delta * weight, 0.0)
        divisor += agrees.to(divisor.dtype) * weight
    return base + total / divisor.clamp(min=_NOTHING)
