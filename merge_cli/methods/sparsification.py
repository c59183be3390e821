"""Sparsification: what is kept of each task vector, and what that is multiplied by.

Five ways, each written once. A function decides for one tensor, in streamed passes where it must
see the whole of it; what it returns is applied block by block:

    magnitude_trim      the largest magnitudes                          TIES
    random_drop         each element with the same chance               DARE
    ranked_drop         a row's larger elements with a larger chance    DELLA (ranked_drop.py)
    middle_band         neither the largest nor the smallest            Model Breadcrumbs
    variance_selection  where the task vectors differ most              SCE

    sparsified.apply(deltas, at)        dropped elements are 0, the others are rescaled
    sparsified.count_kept(deltas, at)   for the report
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from merge_cli.kernels import cut, mask
from merge_cli.kernels.backend import Array
from merge_cli.kernels.cut import Cuts, MagnitudeThreshold, trimmed
from merge_cli.kernels.fused import Masks
from merge_cli.kernels.reduce import absolute_runs, exact_sum, scaled
from merge_cli.kernels.select import exact_cuts, kept_count, magnitude_cuts
from merge_cli.methods.blocks import Block, RowStream, Span, TensorBlocks

if TYPE_CHECKING:
    from torch import Tensor

# true and false are mergekit's spelling: rescale, or do not.
RescaleL1 = Literal["l1", "none", True, False]
Rescale = Literal["density", "l1", "none", True, False]
_SHORTEST = 1e-7  # as in mergekit: a norm below it has no ratio
ONE = 2**32  # the chance 1, as masks compare it
Apply = Callable[[list[Array], Span], list[Array]]


def count_kept(block: Block, prepared: Any, parameters: Mapping[str, Any]) -> list[int]:
    """The capability of every method whose tensor pass returns one of these."""
    counts: list[int] = prepared.count_kept(block.operands, block.at)
    return counts


@dataclass(frozen=True)
class MagnitudeTrim:
    """A cut for each task vector, and a factor for what is kept; None for 1."""

    cuts: Cuts
    factors: Sequence[float] | None = None

    def apply(self, deltas: list[Array], at: Span) -> list[Array]:
        return _rescaled(trimmed(deltas, self.cuts, at.start), self.factors)

    def count_kept(self, deltas: list[Array], at: Span) -> list[int]:
        return [
            cut.count_kept(delta, threshold, at.start)
            for delta, threshold in zip(deltas, self.cuts, strict=True)
        ]


def tensor_cuts(tensor: TensorBlocks, density: Sequence[float]) -> Cuts:
    """The cut of each task vector, ranked within this tensor; ties to the lower index."""
    return magnitude_cuts(density, RowStream(tensor))


def trim_factors(
    tensor: TensorBlocks, density: Sequence[float], rescale: RescaleL1, trim: Apply
) -> list[float]:
    """The L1 norm of each task vector over that of what is kept of it; 1 where it stays whole.

    mergekit's `rescale: true` in TIES and Model Breadcrumbs.
    """
    if rescale in ("none", False) or all(share >= 1.0 for share in density):
        return [1.0] * len(density)
    return [
        before / after if share < 1.0 and min(before, after) >= _SHORTEST else 1.0
        for (before, after), share in zip(l1_norms(tensor, trim), density, strict=True)
    ]


@dataclass(frozen=True)
class RandomDrop:
    """The chance of each task vector's elements to be kept, and a factor for these; None for 1.

    The mask of an element depends on the seed, the source, the tensor's name and the element's
    index alone (see `kernels.mask`).
    """

    density: Sequence[float]
    factors: Sequence[float] | None = None

    def apply(self, deltas: list[Array], at: Span) -> list[Array]:
        where = at.seed, at.sources, at.name, at.start
        return mask.drop(deltas, *where, self.density, self.factors)

    def count_kept(self, deltas: list[Array], at: Span) -> list[int]:
        return mask.count_kept(deltas, at.seed, at.sources, at.name, at.start, self.density)

    def masks(self, at: Span) -> Masks:
        """The masks alone, as one loop over stored bytes takes them."""
        return Masks(at.seed, at.sources, at.name, self.density)

    def factored_out(self, weight: Sequence[float]) -> tuple[RandomDrop, list[float]]:
        """The mask alone, and weights with its factors: one product and one rounding fewer."""
        factors = self.factors or [1.0] * len(weight)
        return RandomDrop(self.density), [w * f for w, f in zip(weight, factors, strict=True)]


def random_drop(tensor: TensorBlocks, density: Sequence[float], rescale: Rescale) -> RandomDrop:
    """Drop with probability 1 - density.

    The factor is 1/density (0 where nothing is kept), which keeps the expectation; or, for `l1`,
    the L1 norm before over the L1 norm after, as in mergekit (0 where nothing survived).
    """
    if rescale != "l1":
        return drop_by_density(density, rescale)
    norms = l1_norms(tensor, RandomDrop(density).apply)
    return RandomDrop(density, [before / after if after else 0.0 for before, after in norms])


def drop_by_density(density: Sequence[float], rescale: Rescale) -> RandomDrop:
    """`random_drop` for any tensor: every rescaling but `l1`."""
    if rescale in ("density", True):
        return RandomDrop(density, [1.0 / share if share else 0.0 for share in density])
    return RandomDrop(density)


@dataclass(frozen=True)
class MiddleBand:
    """For each task vector: a cut that keeps the band and the outliers, one for the outliers alone.

    And a factor for what is kept; None for 1.
    """

    cuts: Cuts
    outliers: Cuts
    factors: Sequence[float] | None = None

    def apply(self, deltas: list[Array], at: Span) -> list[Array]:
        with_outliers = trimmed(deltas, self.cuts, at.start)
        outliers = trimmed(deltas, self.outliers, at.start)
        # An outlier less itself is 0, and nothing else is touched.
        band = [
            kept if threshold is not None and threshold.keeps_nothing else kept - out
            for kept, out, threshold in zip(with_outliers, outliers, self.outliers, strict=True)
        ]
        return _rescaled(band, self.factors)

    def count_kept(self, deltas: list[Array], at: Span) -> list[int]:
        return [
            cut.count_kept(delta, band, at.start) - cut.count_kept(delta, outliers, at.start)
            for delta, band, outliers in zip(deltas, self.cuts, self.outliers, strict=True)
        ]


def middle_band(
    tensor: TensorBlocks, density: Sequence[float], gamma: Sequence[float], rescale: RescaleL1
) -> MiddleBand:
    """Drop the int(gamma * n) largest, keep the int(density * n) next ones; at density 1 all.

    Of equal magnitudes the lower index is the larger.
    """
    size = tensor.size
    kept = [kept_count(share, size) for share in density]
    # What is kept wins: fewer outliers go where both do not fit.
    outliers = [
        min(kept_count(share, size), size - keep) for share, keep in zip(gamma, kept, strict=True)
    ]
    both = [a + b for a, b in zip(kept, outliers, strict=True)]
    stream = RowStream(tensor, lambda block: [*block.operands, *block.operands])
    cuts = exact_cuts([*both, *outliers], stream)
    band = MiddleBand(cuts[: len(both)], cuts[len(both) :])
    return replace(band, factors=trim_factors(tensor, density, rescale, band.apply))


@dataclass(frozen=True)
class VarianceSelection:
    """A cut of the variances over the models, the same for every task vector; None keeps all."""

    cut: MagnitudeThreshold | None

    def apply(self, deltas: list[Tensor], at: Span) -> list[Tensor]:
        if self.cut is None:
            return deltas
        keep = self.cut.keep(_variance(deltas), at.start)
        return [delta.where(keep, 0.0) for delta in deltas]


def variance_selection(tensor: TensorBlocks, share: float) -> VarianceSelection:
    """Of the elements that differ at all, the share with the largest variance; ties to the lower
    index.
    """
    if share >= 1.0:
        return VarianceSelection(None)
    stream = RowStream(tensor, lambda block: [_variance(block.operands)])

    def differing(rows: Iterator[list[Any]]) -> int:
        return sum(int((row != 0).sum()) for (row,) in rows)

    (threshold,) = exact_cuts([kept_count(share, sum(stream.map(differing)))], stream)
    return VarianceSelection(threshold)


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


def l1_norms(tensor: TensorBlocks, sparsify: Apply) -> list[tuple[float, float]]:
    """Of each task vector the L1 norm, and that of what is kept of it; in one streamed pass."""

    def sums(blocks: Iterator[Block]) -> list[list[float]]:
        result: list[list[float]] = []
        for block in blocks:
            arrays = [*block.operands, *sparsify(block.operands, block.at)]
            result = result or [[] for _ in arrays]
            for parts, array in zip(result, arrays, strict=True):
                parts += absolute_runs(array)
        return result

    norms = [exact_sum(parts) for parts in zip(*tensor.map(sums), strict=True)]
    half = len(norms) // 2
    return list(zip(norms[:half], norms[half:], strict=True))


def _rescaled(rows: list[Array], factors: Sequence[float] | None) -> list[Array]:
    if factors is None:
        return rows
    return [
        row if factor == 1.0 else scaled(row, factor)
        for row, factor in zip(rows, factors, strict=True)
    ]
