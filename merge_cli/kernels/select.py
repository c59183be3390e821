"""The exact k-th largest magnitude of a stream, without sorting.

The bit pattern of |x| is monotonic in |x|. So a histogram of its upper 16 bits finds the bin that
holds the k-th largest, a histogram of the next bits within that bin narrows it, until every bit is
known: two passes for float32, four for float64. Counts are integers, so the result depends on
neither blocks nor device. Ties at the threshold go to the lower index: one more pass, only where
some ties must be dropped, finds the last tie that is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_LEVEL_BITS = 16
ALL_TIES = 2**63 - 1


@dataclass(frozen=True)
class Cut:
    """Keep |x| > threshold, and |x| = threshold up to and including flat index `last_tie`."""

    threshold: float
    last_tie: int

    def keep(self, x: Tensor, start: int) -> Tensor:
        """The boolean mask of what is kept, for a flat span that begins at index `start`."""
        magnitude = x.abs()
        kept = magnitude > self.threshold
        ties = min(max(self.last_tie - start + 1, 0), x.numel())
        if ties:
            kept[:ties] |= magnitude[:ties] == self.threshold
        return kept


def kept_count(density: float, size: int) -> int:
    """int(density * size) with density as written: 0.29 of 100 is 29, not 28.999... cut to 28."""
    return int(Fraction(repr(float(density))) * size)


class MagnitudeSearch:
    """The state of one search for the k-th largest magnitude; `k` from 1 to the stream's length.

    Feed every block in order, then call `end_pass`; repeat while `unfinished`.
    """

    def __init__(self, k: int) -> None:
        self.k = k
        self.threshold: float | None = None
        self.tie_ordinal: int | None = None  # which tie is the last that is kept; None: all are
        self._above = 0  # how many are larger than everything in the current bin
        self._prefix = 0
        self._shift: int | None = None  # bits below the current level; None before any data
        self._counts: Tensor | None = None

    @property
    def unfinished(self) -> bool:
        return self.threshold is None

    def feed(self, x: Tensor) -> None:
        """Count one flat float32 or float64 block."""
        import torch

        integer, width = (torch.int32, 31) if x.dtype == torch.float32 else (torch.int64, 63)
        if self._shift is None:
            self._shift = width - _LEVEL_BITS
        bits = x.view(integer) & (2**width - 1)
        level = min(_LEVEL_BITS, width)
        if self._shift + level < width or self._prefix:
            inside = (bits >> (self._shift + self._level_width(width))) == self._prefix
            bits = bits[inside]
        index = (bits >> self._shift) & (2 ** self._level_width(width) - 1)
        counts = torch.bincount(index, minlength=2**_LEVEL_BITS)
        self._counts = counts if self._counts is None else self._counts + counts
        self._width = width

    def end_pass(self) -> None:
        """Choose the bin that holds the k-th largest and go one level down."""
        import torch

        assert self._counts is not None, "no data was fed"
        assert self._shift is not None
        counts = self._counts.cpu()
        from_top = counts.flip(0).cumsum(0)
        reverse = int(torch.searchsorted(from_top, self.k - self._above))
        chosen = len(counts) - 1 - reverse
        in_bin = int(counts[chosen])
        self._above += int(from_top[reverse]) - in_bin
        self._prefix = (self._prefix << self._level_width(self._width)) | chosen
        self._counts = None
        if self._shift == 0:
            real, integer = (
                (torch.float32, torch.int32) if self._width == 31 else (torch.float64, torch.int64)
            )
            self.threshold = float(torch.tensor(self._prefix, dtype=integer).view(real))
            needed = self.k - self._above
            self.tie_ordinal = None if needed == in_bin else needed
        else:
            self._shift = max(0, self._shift - _LEVEL_BITS)

    def _level_width(self, width: int) -> int:
        """Bits of the level that starts at `_shift`: 16, and what is left over for the lowest."""
        lowest = width % _LEVEL_BITS or _LEVEL_BITS
        return lowest if self._shift == 0 else _LEVEL_BITS


class TieSearch:
    """Finds the flat index of the n-th element whose magnitude equals a threshold."""

    def __init__(self, threshold: float, ordinal: int) -> None:
        self.threshold, self._left = threshold, ordinal
        self.index: int | None = None

    def feed(self, x: Tensor, start: int) -> None:
        """Look through one flat block that begins at index `start`."""
        if self.index is not None:
            return
        ties = x.abs() == self.threshold
        count = int(ties.sum())
        if count >= self._left:
            self.index = start + int(ties.nonzero()[self._left - 1])
        self._left -= count


Blocks = Callable[[], Iterable[tuple[int, "list[Tensor]"]]]


def magnitude_cuts(densities: list[float], size: int, blocks: Blocks) -> list[Cut | None]:
    """For every operand of one tensor, the cut that keeps exactly int(density * size) elements.

    Args:
        blocks: yields (start, operands) over the tensor, in order, each time it is called; all
            operands of one dtype.

    Returns:
        One cut for each operand; None where nothing is trimmed (density 1).
    """
    cuts: list[Cut | None] = [None] * len(densities)
    searches: dict[int, MagnitudeSearch] = {}
    for i, density in enumerate(densities):
        k = kept_count(density, size)
        if k == 0:
            cuts[i] = Cut(float("inf"), -1)
        elif k < size:
            searches[i] = MagnitudeSearch(k)
    run_searches(searches, blocks)
    ties: dict[int, TieSearch] = {}
    for i, search in searches.items():
        assert search.threshold is not None
        cuts[i] = Cut(search.threshold, ALL_TIES)
        # NaN is above every threshold and equal to none: there are no ties to choose among.
        if search.tie_ordinal is not None and search.threshold == search.threshold:
            ties[i] = TieSearch(search.threshold, search.tie_ordinal)
    if ties:
        for start, operands in blocks():
            for i, tie in ties.items():
                tie.feed(operands[i], start)
            if all(tie.index is not None for tie in ties.values()):
                break
        for i, tie in ties.items():
            assert tie.index is not None
            cuts[i] = Cut(tie.threshold, tie.index)
    return cuts


def run_searches(searches: dict[int, MagnitudeSearch], blocks: Blocks) -> None:
    """Feed the blocks to every search until each has its threshold."""
    while any(search.unfinished for search in searches.values()):
        active = {i: search for i, search in searches.items() if search.unfinished}
        for _, operands in blocks():
            for i, search in active.items():
                search.feed(operands[i])
        for search in active.values():
            search.end_pass()
