"""Consensus: how task vectors, or models, become one. Each way is written once.

    linear_sum      sum of w_i * d_i                        task arithmetic, DARE, DELLA-linear, ...
    disjoint_merge  elect a sign for each element, add up   dare_ties, DELLA, breadcrumbs_ties
                    or average what agrees with it
    weighted_mean   sum of w_i * x_i / sum of w_i           RegMean, Fisher: where nothing is known

`disjoint_merge` is steps 2 and 3 of TIES (arXiv:2306.01708) as mergekit has them; TIES and SCE have
more to choose and call `kernels.elect.disjoint_mean` themselves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from merge_cli.kernels.backend import Array
from merge_cli.kernels.elect import disjoint_mean
from merge_cli.kernels.reduce import divided, weighted_sum

Elect = Literal["weighted", "unweighted"]
_NOTHING = 1e-8  # as in mergekit: a smaller sum of weights is none


def weights_cancel(weight: Sequence[float], normalize: bool) -> str:
    """Why these weights have no average; empty when they have one."""
    if normalize and abs(math.fsum(weight)) < _NOTHING:
        return f"the weights {list(weight)} sum to 0, so that normalizing divides by 0"
    return ""


def no_average(weight: Sequence[float]) -> str:
    """`weights_cancel` for methods that always normalize."""
    return weights_cancel(weight, True)


def linear_sum(weight: Sequence[float], deltas: Sequence[Array], divisor: float = 1.0) -> Array:
    """sum of w_i * d_i, divided once where the divisor is not 1."""
    mixed = weighted_sum(weight, deltas)
    return mixed if divisor == 1.0 else divided(mixed, divisor)


def divisor_of(weight: Sequence[float], normalize: bool) -> float:
    """What a sum of task vectors is divided by: the sum of their weights if `normalize`.

    1 where the weights cancel: then the base is as good.
    """
    total = math.fsum(weight) if normalize else 1.0
    return 1.0 if abs(total) < _NOTHING else total


def disjoint_merge(
    weight: Sequence[float],
    deltas: Sequence[Array],
    *,
    normalize: bool,
    elect: Elect = "weighted",
) -> Array:
    """Elect the sign of sum of w_i * d_i (or d_i), add up the w_i * d_i that agree with it.

    Args:
        normalize: divide each element by the sum of the weights that agree.
    """
    return disjoint_mean(
        deltas,
        weight,
        weighted_election=elect == "weighted",
        divide_by="weights" if normalize else "nothing",
    )


def weighted_mean(weight: Sequence[float], arrays: Sequence[Any]) -> Any:
    """Sum of w_i * x_i over the sum of w_i, from the first array on: equal arrays stay equal."""
    total = math.fsum(weight)
    merged = arrays[0] * 1.0  # a copy: a block is a worker's buffer
    for w, array in zip(weight[1:], arrays[1:], strict=True):
        merged = merged + (w / total) * (array - arrays[0])
    return merged
