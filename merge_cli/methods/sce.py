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

from merge_cli.kernels.elect import disjoint_mean
from merge_cli.kernels.reduce import dot_runs, exact_sum
from merge_cli.methods.blocks import Block, Span, TensorBlocks
from merge_cli.methods.parameters import CappedShare
from merge_cli.methods.registry import merge_method
from merge_cli.methods.sparsification import VarianceSelection, variance_selection

if TYPE_CHECKING:
    from torch import Tensor

_NOTHING = 1e-6  # as in mergekit: below it weights are equal, and a divisor is this


@dataclass(frozen=True)
class Selected:
    """What a tensor is merged with: the selected elements and each model's weight."""

    selection: VarianceSelection
    weights: list[float]


def select(tensor: TensorBlocks, model: None, *, select_topk: float, **_: Any) -> Selected:
    """Steps 1 and 2, in streamed passes."""
    selection = variance_selection(tensor, select_topk)

    def squares(blocks: Iterator[Block]) -> list[list[float]]:
        result: list[list[float]] = []
        for block in blocks:
            deltas = selection.apply(block.operands, block.at)
            result = result or [[] for _ in deltas]
            for parts, delta in zip(result, deltas, strict=True):
                parts += dot_runs(delta, delta)
        return result

    sums = [exact_sum(parts) / tensor.size for parts in zip(*tensor.map(squares), strict=True)]
    total = math.fsum(sums)
    if total < _NOTHING:
        return Selected(selection, [1.0 / len(sums)] * len(sums))
    return Selected(selection, [item / total for item in sums])


@merge_method("sce", paper="arXiv:2408.07990", tensor_pass=select)
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
    mean: Tensor = disjoint_mean(
        prepared.selection.apply(deltas, at),
        prepared.weights,
        weighted_election=False,
        divide_by="weights",
        least_divisor=_NOTHING,
    )
    return base + mean
