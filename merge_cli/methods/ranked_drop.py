"""Sparsification by rank: a row's larger elements are kept with a larger chance. DELLA's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from merge_cli.kernels import mask
from merge_cli.methods.blocks import Span, TensorBlocks, load_whole
from merge_cli.methods.sparsification import ONE, Rescale, l1_norms

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class RankedVector:
    """How one task vector is dropped by rank.

    Attributes:
        ranks: int32, of each element within its row, 0 for the smallest; None where all are kept,
            or none (density 0).
        last: the largest rank of a row.
        density, epsilon: its parameters.
        factor: of what is kept; None for 1/p of each element.
    """

    ranks: Tensor | None
    last: int
    density: float
    epsilon: float
    factor: float | None

    def apply(self, delta: Tensor, at: Span, source: int) -> Tensor:
        """A flat span of the task vector with its mask and its rescaling."""
        if self.ranks is None:
            return delta if self.density else delta.new_zeros(len(delta))
        import torch

        ranks = self.ranks[at.start : at.start + len(delta)].to(torch.float64)
        chance = self.density - self.epsilon + 2 * self.epsilon * (ranks / max(self.last, 1))
        if not self.last:  # rows of one element have no ranks
            chance = torch.full_like(chance, self.density)
        words = mask.random_words(at.seed, source, at.name, at.start, len(delta), delta.device)
        keep = words < (chance * ONE).round().to(torch.int64)
        rescaled = delta / chance.to(delta.dtype) if self.factor is None else delta * self.factor
        return rescaled.where(keep, 0.0)


@dataclass(frozen=True)
class RankedDrop:
    """The ranks of each task vector of a tensor."""

    vectors: Sequence[RankedVector]

    def apply(self, deltas: list[Tensor], at: Span) -> list[Tensor]:
        return [
            vector.apply(delta, at, source)
            for vector, delta, source in zip(self.vectors, deltas, at.sources, strict=True)
        ]


def ranked_drop(
    tensor: TensorBlocks, density: Sequence[float], epsilon: Sequence[float], rescale: Rescale
) -> RankedDrop:
    """Rank every row by magnitude; of equal ones the lower index is the larger. Holds the tensor.

    An element of rank r among n is kept with the chance p = density - epsilon + 2 epsilon r/(n-1).
    """
    _, deltas = load_whole(tensor)
    width = tensor.shape[-1] if tensor.shape else 1
    factor = None if rescale in ("density", True) else 1.0
    vectors = []
    for delta, share, spread in zip(deltas, density, epsilon, strict=True):
        ranks = _ranks(delta, width) if 0.0 < share < 1.0 else None
        vectors.append(RankedVector(ranks, width - 1, share, spread, factor))
    drop = RankedDrop(vectors)
    if rescale != "l1":
        return drop
    factors = [before / after if after else 0.0 for before, after in l1_norms(tensor, drop.apply)]
    return RankedDrop([replace(v, factor=f) for v, f in zip(vectors, factors, strict=True)])


def _ranks(delta: Tensor, width: int) -> Tensor:
    """The rank of each element by magnitude within its row of `width`, flat."""
    import torch

    rows = delta.reshape(-1, width).abs()
    largest_first = rows.sort(dim=-1, descending=True, stable=True).indices
    descending = torch.arange(width - 1, -1, -1, dtype=torch.int32, device=rows.device)
    ranks = torch.empty(rows.shape, dtype=torch.int32, device=rows.device)
    ranks.scatter_(-1, largest_first, descending.expand_as(ranks))
    return ranks.reshape(-1)
