"""Sums over whole tensors that come out the same however the tensor is read.

Each run of 65,536 elements is summed by itself in float64, and the partial sums are added exactly.
Blocks are whole numbers of runs (`BLOCK_MULTIPLE`), so their size does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

BLOCK_MULTIPLE = 65_536


class ExactSum:
    """An order-independent sum of float64 partial sums."""

    def __init__(self) -> None:
        self._parts: list[float] = []

    def add(self, values: Tensor) -> None:
        """Add every element of one flat block."""
        for start in range(0, values.numel(), BLOCK_MULTIPLE):
            run = values[start : start + BLOCK_MULTIPLE]
            self._parts.append(float(run.double().sum()))

    @property
    def value(self) -> float:
        return math.fsum(self._parts)


def divided(x: Tensor, number: float) -> Tensor:
    """x / number, a true division everywhere: a GPU would multiply by 1/number given a scalar."""
    return x / x.new_full((1,), number)


def weighted_sum(weights: Iterable[float], tensors: Iterable[Tensor]) -> Tensor:
    """sum of w * x in the given order: a product, then an addition, each rounded by itself.

    Not fused, so that vector code, its scalar tail and a GPU all round alike.
    """
    total: Tensor | None = None
    for weight, tensor in zip(weights, tensors, strict=True):
        term = tensor * weight
        total = term if total is None else total.add_(term)
    assert total is not None, "nothing to sum"
    return total
