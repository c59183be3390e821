"""RAM: reinforced agent merging. arXiv:2601.13572.

Reinforcement learning changes few weights. What one model alone has changed is added as it is, what
several have changed is averaged over those that did.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

from merge_cli.methods.blocks import Block, TensorBlocks
from merge_cli.methods.parameters import Range
from merge_cli.methods.registry import merge_method

if TYPE_CHECKING:
    from torch import Tensor

AtLeastZero = Annotated[float, Range(0.0)]


def _changed(deltas: list[Tensor], epsilon: float) -> tuple[Tensor, Tensor]:
    """Which elements each model has changed, bool [sources, n], and how many models each."""
    import torch

    moved = torch.stack([delta.abs() > epsilon for delta in deltas])
    return moved, moved.sum(0)


def shares_of_overlap(
    tensor: TensorBlocks, model: None, *, r: float, alpha: float, epsilon: float, **_: Any
) -> list[float]:
    """1 + r * min(rho, alpha) for each model: rho is what it shares over what it has alone."""

    def counts(blocks: Iterator[Block]) -> list[tuple[int, int]]:
        result: list[tuple[int, int]] = []
        for block in blocks:
            moved, together = _changed(block.operands, epsilon)
            result = result or [(0, 0)] * len(moved)
            result = [
                (
                    shared + int((row & (together > 1)).sum()),
                    alone + int((row & (together == 1)).sum()),
                )
                for (shared, alone), row in zip(result, moved, strict=True)
            ]
        return result

    scales = []
    for parts in zip(*tensor.map(counts), strict=True):
        shared, alone = (sum(part[i] for part in parts) for i in (0, 1))
        least = max(alone, epsilon)  # both 0 where a model shares all that it has changed
        rho = (shared / least if least else math.inf) if shared else 0.0
        scales.append(1.0 + r * min(max(rho, 0.0), alpha))
    return scales


@merge_method("ram", paper="arXiv:2601.13572")
def ram(base: Tensor, deltas: list[Tensor], *, epsilon: AtLeastZero = 1e-5) -> Tensor:
    """Add what one model alone has changed, average what several have.

    Args:
        epsilon: a change up to this is none.
    """
    return _merged(base, deltas, epsilon, [1.0] * len(deltas))


@merge_method(
    "ramplus_tl",
    paper="arXiv:2601.13572",
    tensor_pass=shares_of_overlap,
)
def ramplus_tl(
    base: Tensor,
    deltas: list[Tensor],
    prepared: list[float],
    *,
    r: AtLeastZero = 0.1,
    alpha: AtLeastZero = 0.2,
    epsilon: AtLeastZero = 1e-5,
) -> Tensor:
    """RAM with what one model alone has changed made larger, the more it shares with others.

    Args:
        r: how much larger, for each unit of overlap.
        alpha: the largest overlap that counts.
        epsilon: a change up to this is none.
    """
    return _merged(base, deltas, epsilon, prepared)


def _merged(base: Tensor, deltas: list[Tensor], epsilon: float, scales: list[float]) -> Tensor:
    import torch

    moved, together = _changed(deltas, epsilon)
    total = torch.zeros_like(base)
    for delta, row, scale in zip(deltas, moved, scales, strict=True):
        alone = torch.where(together == 1, delta * scale, delta / together.clamp(min=1))
        total += torch.where(row, alone, 0.0)
    return base + total
