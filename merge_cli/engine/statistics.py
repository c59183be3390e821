"""What the sources are like, measured while their blocks are in hand.

For each tensor: sums over elements, so that layers and models are sums of tensors. For methods on
task vectors the operands are deltas; otherwise they are the weights themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from merge_cli.kernels.measure import dot, gram, signs, squared_distance
from merge_cli.kernels.reduce import BLOCK_MULTIPLE
from merge_cli.methods.blocks import Block

_MAX_PAIRS_SOURCES = 16
_SAMPLE_STRIDE = 4  # rates are counted on every fourth run of elements, which is plenty


@dataclass
class TensorStats:
    """Sums over the elements of one tensor (or of several, after `add`).

    Attributes:
        count: elements.
        gram: dot products between operands, S x S as nested lists (only the diagonal's entries
            are filled with more than 16 operands).
        agree, both: for each pair of operands, elements on which both are non-zero, and those of
            them with the same sign (counted on a fixed quarter of the elements).
        conflict, sampled: elements on which some operands are positive and others negative, and
            elements looked at (the same quarter).
        kept: for each operand, elements that trimming or dropping kept, of `sampled`; empty if the
            method does neither.
        base, change: squared norms of the base and of (merged - base); 0 without a base.
        non_finite: for each operand, how many NaN or Inf.
    """

    count: int = 0
    gram: list[list[float]] = field(default_factory=list)
    agree: list[list[int]] = field(default_factory=list)
    both: list[list[int]] = field(default_factory=list)
    conflict: int = 0
    sampled: int = 0
    kept: list[int] = field(default_factory=list)
    base: float = 0.0
    change: float = 0.0
    non_finite: list[int] = field(default_factory=list)

    def add(self, other: TensorStats) -> None:
        """Sum in place; both must be of the same operands."""
        self.count += other.count
        self.conflict += other.conflict
        self.sampled += other.sampled
        self.base += other.base
        self.change += other.change
        self.gram = _sum_matrix(self.gram, other.gram)
        self.agree = _sum_matrix(self.agree, other.agree)
        self.both = _sum_matrix(self.both, other.both)
        self.kept = _sum_list(self.kept, other.kept)
        self.non_finite = _sum_list(self.non_finite, other.non_finite)

    def to_json(self) -> dict[str, Any]:
        """Fields that hold something."""
        return {name: value for name, value in vars(self).items() if value}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> TensorStats:
        return cls(**data)


Kept = Callable[[Block], list[int]]


class Meter:
    """Measures the blocks of one unit while they are in hand.

    Args:
        stats: what is added to.
        kept: the method's count of what trimming or dropping keeps, if it does either.
    """

    def __init__(self, stats: TensorStats, kept: Kept | None) -> None:
        self._stats, self._kept = stats, kept

    def add(self, block: Block, merged: Any) -> None:
        """Add one block. `merged` is the method's result, not yet rounded."""
        stats, length = self._stats, len(merged)
        sources = len(block.operands)
        stats.count += length
        pairs = sources <= _MAX_PAIRS_SOURCES
        stats.gram = _sum_matrix(stats.gram, gram(block.operands, pairs=pairs))
        if block.base is not None:
            stats.base += dot(block.base, block.base)
            stats.change += squared_distance(merged, block.base)
        for start in range(0, length, BLOCK_MULTIPLE):
            # By the place in the tensor, so that the sample does not depend on how it is cut.
            if ((block.at.start + start) // BLOCK_MULTIPLE) % _SAMPLE_STRIDE:
                continue
            run = slice(start, start + BLOCK_MULTIPLE)
            operands = [operand[run] for operand in block.operands]
            stats.sampled += len(operands[0])
            if self._kept is not None:
                at = replace(block.at, start=block.at.start + start)
                stats.kept = _sum_list(stats.kept, self._kept(Block(None, operands, at)))
            if sources > 1 and pairs:
                both, agree, conflict = signs(operands)
                stats.both = _sum_matrix(stats.both, both)
                stats.agree = _sum_matrix(stats.agree, agree)
                stats.conflict += conflict


def _sum_list(a: Sequence[Any], b: Sequence[Any]) -> list[Any]:
    if not a or not b:
        return list(a or b)
    return [x + y for x, y in zip(a, b, strict=True)]


def _sum_matrix(a: Sequence[Sequence[Any]], b: Sequence[Sequence[Any]]) -> list[list[Any]]:
    if not a or not b:
        return [list(row) for row in (a or b)]
    return [_sum_list(x, y) for x, y in zip(a, b, strict=True)]
