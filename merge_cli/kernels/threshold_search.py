"""One operand's search for a threshold: where it may lie after each pass over the stream.

    a sample ─▶ a bracket, or few candidates ─▶ counts of the whole ─▶ the key, or a narrower range

`select` makes the passes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from merge_cli.kernels.keys import KeyCounter, RangeCounter, SpanCounts, number

_BINS = 2**19  # of a histogram: 2 MB of int32 for each operand and thread
FEW = 8  # keys that are counted one by one, without a histogram


def bracket_ranks(share: float, size: int) -> tuple[int, int]:
    """Between which elements of an ordered sample, ascending, that share's threshold should be."""
    # Six standard deviations of a rank in a sample of independent elements; neighbours are alike,
    # hence the rest.
    error = 6 * math.sqrt(share * (1 - share) / size) + 1e-4
    low, high = (1 - share - error) * size - 2, (1 - share + error) * size + 2
    return min(max(int(low), 0), size - 1), min(max(int(high), 0), size - 1)


class ThresholdSearch:
    """One operand's search for the k-th largest key, which is looked for from `low` to `high`.

    Attributes:
        candidates: a few keys, ascending, of which it probably is one; then these are counted.
        settled: whether the threshold is known, and in which span its last tie lies.
        needed: once settled, how many of the elements that equal the threshold are kept.
        all_ties: whether that is all of them.
        ties: their number in each span.
    """

    def __init__(self, k: int, low: int, high: int, width: int, candidates: list[int]) -> None:
        self.k, self.width = k, width
        self.low, self.high, self.candidates = low, high, candidates
        self.settled, self.all_ties = False, False
        self.needed = 0
        self.ties: list[int] = []

    @property
    def shift(self) -> int:
        """How many low bits of a key share a bin."""
        return max(0, (self.high - self.low).bit_length() - _BINS.bit_length() + 1)

    @property
    def threshold(self) -> float:
        return number(self.low, self.width)

    def counter(self) -> RangeCounter | KeyCounter:
        """What counts for the next pass."""
        if self.high - self.low < FEW:
            self.candidates = list(range(self.low, self.high + 1))
        if self.candidates:
            return KeyCounter(self.candidates)
        return RangeCounter(self.low, self.high, self.shift)

    def narrow(self, total: RangeCounter | KeyCounter, spans: Sequence[SpanCounts | None]) -> None:
        """Go where the counts of the whole stream say that the k-th largest lies."""
        if isinstance(total, KeyCounter):
            self._narrow_to_key(total, spans)
        else:
            self._narrow_to_bin(*total.result(), spans)

    def _narrow_to_key(self, total: KeyCounter, spans: Sequence[SpanCounts | None]) -> None:
        # From the largest candidate down. The threshold may also lie between two of them, or
        # beyond, where the sample has seen nothing: then that gap is the next range.
        ceiling = 2**self.width - 1
        for candidate in reversed(range(len(self.candidates))):
            key, above, equal = (
                self.candidates[candidate],
                *(int(counts[candidate]) for counts in (total.above, total.equal)),
            )
            if self.k <= above:
                self.low, self.high, self.candidates = key + 1, ceiling, []
                return
            if self.k <= above + equal:
                self.low = self.high = key
                self._settle(candidate, self.k - above, equal, spans)
                return
            ceiling = key - 1
        self.low, self.high, self.candidates = 0, ceiling, []

    def _narrow_to_bin(
        self, above: int, total: SpanCounts, spans: Sequence[SpanCounts | None]
    ) -> None:
        if self.k <= above:  # the sample was unlucky: the bracket lies too low
            self.low, self.high = self.high + 1, 2**self.width - 1
            return
        chosen = total.bin_of_rank(self.k - above)
        if chosen is None:  # or too high
            self.low, self.high = 0, self.low - 1
            return
        index, larger, inside = chosen
        first = self.low + (index << self.shift)
        last = min(self.high, first + (1 << self.shift) - 1)
        self.low, self.high = first, last
        if first == last:
            self._settle(index, self.k - above - larger, inside, spans)

    def _settle(
        self, index: int, needed: int, inside: int, spans: Sequence[SpanCounts | None]
    ) -> None:
        """The key is known; so is in which span the last tie lies, if the spans' counts are."""
        self.needed, self.all_ties = needed, needed == inside
        self.ties = [span.at(index) for span in spans if span is not None]
        # Where they were too many to keep, the next pass counts this key alone.
        self.settled = self.all_ties or len(self.ties) == len(spans)
