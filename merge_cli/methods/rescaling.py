"""Rescaling what trimming leaves of a task vector to the length of the whole one, by L1 norms.

mergekit's `rescale: true` in TIES and Model Breadcrumbs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from merge_cli.kernels.reduce import absolute_runs, exact_sum, scaled
from merge_cli.methods.blocks import Block, TensorBlocks

# true and false are mergekit's spelling.
RescaleL1 = Literal["l1", "none", True, False]
_SHORTEST = 1e-7  # as in mergekit: a norm below it has no ratio
Trim = Callable[[list[Any], int], list[Any]]  # operands and the flat index of the first element


def l1_factors(
    tensor: TensorBlocks, density: Sequence[float], rescale: RescaleL1, trim: Trim
) -> list[float]:
    """The L1 norm of each task vector over that of what is kept of it; 1 where it stays whole."""
    if rescale in ("none", False) or all(share >= 1.0 for share in density):
        return [1.0] * len(density)

    def sums(blocks: Iterator[Block]) -> list[list[float]]:
        result: list[list[float]] = [[] for _ in range(2 * len(density))]
        for block in blocks:
            arrays = [*block.operands, *trim(block.operands, block.at.start)]
            for parts, array in zip(result, arrays, strict=True):
                parts += absolute_runs(array)
        return result

    norms = [exact_sum(parts) for parts in zip(*tensor.map(sums), strict=True)]
    before, after = norms[: len(density)], norms[len(density) :]
    return [
        b / a if share < 1.0 and min(a, b) >= _SHORTEST else 1.0
        for b, a, share in zip(before, after, density, strict=True)
    ]


def rescaled(rows: list[Any], factors: Sequence[float]) -> list[Any]:
    """Trimmed blocks times their factors."""
    return [
        row if factor == 1.0 else scaled(row, factor)
        for row, factor in zip(rows, factors, strict=True)
    ]
