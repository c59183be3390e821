"""The exact k-th largest magnitude of a stream, without sorting, mostly in one pass.

The bit pattern of |x| (its *key*) is monotonic in |x|. A sample brackets the key that is looked
for; a pass counts how many keys lie above the bracket and makes a histogram of those inside. That
names the key exactly, or a narrower range (one bin, or what lies beside a bracket that missed),
and the next pass looks there. Counts are integers: the result depends on neither sample, blocks,
threads nor device. Equal magnitudes are kept from the lowest index on; the counts of each span
tell in which span the last one that is kept lies, and only that span is looked at again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from functools import lru_cache, partial
from itertools import accumulate
from typing import Any, Protocol, TypeVar

from merge_cli.kernels.backend import to_numpy
from merge_cli.kernels.cut import ALL_TIES, MagnitudeThreshold
from merge_cli.kernels.fused import StoredBlock
from merge_cli.kernels.keys import (
    SpanCounts,
    few_keys,
    find_tie,
    keys,
    number,
)
from merge_cli.kernels.kth_largest import kth_largest
from merge_cli.kernels.passes import count_blocks, find_ties
from merge_cli.kernels.threshold_search import FEW, ThresholdSearch, bracket_ranks

# One element of so many is sampled, within these; a smaller stream is held. A bracket from fewer is
# wider than the bins of a histogram tell apart, and costs a second pass.
_SAMPLE_SHARE = 64
_SMALLEST_SAMPLE, _LARGEST_SAMPLE = 2**17, 2**21
_KEPT_COUNTS = 4_000_000  # bins of single spans that may be held, 12 bytes each
T = TypeVar("T")
Rows = Sequence[Any]
Counted = dict[int, "SpanCounts | None"]


class Stream(Protocol):
    """The operands of one tensor, or of a whole model, in spans that threads may share.

    Attributes:
        size: elements of each operand.
        starts: the flat index at which each span begins, and at the end `size`.
    """

    @property
    def size(self) -> int: ...

    @property
    def starts(self) -> Sequence[int]: ...

    def sample(self, count: int) -> Iterable[Rows]:
        """Small blocks of about `count` elements in all, evenly spread; all, in order, if few."""

    def map(self, work: Callable[[Iterable[Rows]], T], only: int | None = None) -> list[T]:
        """work(blocks of a span), for every span or one; the results in the spans' order."""

    def sample_keys(self, count: int) -> Any:
        """The keys of such a sample, uint32 [operands, elements]; None: take `sample`."""

    def map_stored(
        self, work: Callable[[Iterable[StoredBlock]], T], only: int | None = None
    ) -> list[T] | None:
        """work(a span's blocks as they are stored); None where they are not."""


@lru_cache(1024)  # tensors of a layer after those of another: the same few densities and sizes
def kept_count(density: float, size: int) -> int:
    """int(density * size) with density as written: 0.29 of 100 is 29, not 28.999... cut to 28."""
    return int(Fraction(repr(float(density))) * size)


def trimmed_count(density: float, size: int) -> int:
    """What trimming keeps: of any density above 0 at least one element."""
    return max(kept_count(density, size), 1) if density > 0 and size else 0


def magnitude_cuts(densities: Sequence[float], stream: Stream) -> list[MagnitudeThreshold | None]:
    """For every operand, the cut that keeps exactly int(density * size) elements, at least one.

    Returns:
        One cut for each operand; None where nothing is trimmed (density 1).
    """
    return exact_cuts([trimmed_count(density, stream.size) for density in densities], stream)


def exact_cuts(counts: Sequence[int], stream: Stream) -> list[MagnitudeThreshold | None]:
    """For every operand, the cut that keeps so many elements; None where it keeps all of them."""
    cuts: list[MagnitudeThreshold | None] = [None] * len(counts)
    requested: dict[int, int] = {}
    for i, k in enumerate(counts):
        if k == 0:
            cuts[i] = MagnitudeThreshold(math.inf, -1)
        elif k < stream.size:
            requested[i] = k
    if requested and stream.size <= _SMALLEST_SAMPLE:
        for i, cut in _cuts_of_few(requested, stream).items():
            cuts[i] = cut
        return cuts
    searches = _run(_brackets(requested, stream), stream)
    last_ties = _last_ties(searches, stream)
    for i, search in searches.items():
        cuts[i] = MagnitudeThreshold(search.threshold, last_ties.get(i, ALL_TIES))
    return cuts


def _cuts_of_few(requested: dict[int, int], stream: Stream) -> dict[int, MagnitudeThreshold]:
    """The cuts of a stream that is small enough to be held: read once, no histogram of a sample."""
    import numpy as np

    blocks = [[to_numpy(rows[i]) for i in requested] for rows in stream.sample(stream.size)]
    rows = blocks[0] if len(blocks) == 1 else list(map(np.concatenate, zip(*blocks, strict=True)))
    width = 8 * rows[0].itemsize - 1
    cuts = {}
    ranks = kth_largest(rows, list(requested.values()))
    for i, (key, last_kept) in zip(requested, ranks, strict=True):
        cuts[i] = MagnitudeThreshold(number(key, width), last_kept)
    return cuts


def _brackets(requested: dict[int, int], stream: Stream) -> dict[int, ThresholdSearch]:
    """Where a sample says that each operand's threshold should be, with room for its error."""
    if not requested:
        return {}
    import numpy as np

    count = min(max(stream.size // _SAMPLE_SHARE, _SMALLEST_SAMPLE), _LARGEST_SAMPLE)
    samples = stream.sample_keys(count)
    if samples is None:
        blocks = [[keys(row) for row in rows] for rows in stream.sample(count)]
        samples = [np.concatenate(rows) for rows in zip(*blocks, strict=True)]
    rows = [samples[i].view(f"f{samples[i].itemsize}") for i in requested]
    width, size = 8 * rows[0].itemsize - 1, len(rows[0])
    bounds = [bracket_ranks(k / stream.size, size) for k in requested.values()]
    lows = kth_largest(rows, [size - low for low, _ in bounds])
    highs = kth_largest(rows, [size - high for _, high in bounds])
    searches = {}
    for (i, k), (low, _), (high, _) in zip(requested.items(), lows, highs, strict=True):
        # Differences of 16-bit weights take few values: then one of these is the threshold.
        candidates = few_keys(samples[i], low, high, FEW)
        searches[i] = ThresholdSearch(k, low, high, width, candidates)
    return searches


def _run(searches: dict[int, ThresholdSearch], stream: Stream) -> dict[int, ThresholdSearch]:
    """Pass over the stream until every threshold is known."""
    while active := {i: search for i, search in searches.items() if not search.settled}:
        counters = {i: search.counter() for i, search in active.items()}
        # Counts of single spans tell where the last kept tie lies; few enough of them are kept.
        room = _KEPT_COUNTS // (len(active) * (len(stream.starts) - 1))

        spans = stream.map_stored(partial(_count_stored, counters, room))
        if spans is None:
            spans = stream.map(partial(_count, counters, room))
        for i, search in active.items():
            search.narrow(counters[i], [span[i] for span in spans])
    return searches


def _count(totals: dict[int, Any], room: int, blocks: Iterable[Rows]) -> Counted:
    counters = {i: total.empty_copy() for i, total in totals.items()}
    for rows in blocks:
        for i, counter in counters.items():
            counter.feed(rows[i])
    return {i: totals[i].add(counter, room) for i, counter in counters.items()}


def _count_stored(totals: dict[int, Any], room: int, blocks: Iterable[StoredBlock]) -> Counted:
    counters = {i: total.empty_copy() for i, total in totals.items()}
    count_blocks(counters, blocks)
    return {i: totals[i].add(counter, room) for i, counter in counters.items()}


def _last_ties(searches: dict[int, ThresholdSearch], stream: Stream) -> dict[int, int]:
    """For each operand that keeps some ties and not others, the index of the last that is kept."""
    # Ties are kept from the lowest index on, so the last one lies where the running sum of the
    # spans' counts reaches what is needed; only that span is read again.
    by_span: dict[int, dict[int, int]] = {}  # span -> operand -> which of its ties
    for i, search in searches.items():
        if not search.all_ties and not math.isnan(search.threshold):
            up_to = list(accumulate(search.ties))
            span = next(n for n, count in enumerate(up_to) if count >= search.needed)
            ordinal = search.needed - (up_to[span] - search.ties[span])
            by_span.setdefault(span, {})[i] = ordinal
    result: dict[int, int] = {}
    thresholds = {i: search.threshold for i, search in searches.items()}
    for span, ordinals in by_span.items():
        offset = stream.starts[span]
        stored = partial(find_ties, thresholds=thresholds, ordinals=ordinals)
        indexes = stream.map_stored(stored, only=span)
        if indexes is None:
            indexes = stream.map(partial(_find, thresholds, ordinals), only=span)
        result |= {i: offset + index for i, index in indexes[0].items()}
    return result


def _find(
    thresholds: dict[int, float], ordinals: dict[int, int], blocks: Iterable[Rows]
) -> dict[int, int]:
    ordinals_left, result, offset = dict(ordinals), {}, 0
    for rows in blocks:
        for i, ordinal in tuple(ordinals_left.items()):
            index = find_tie(rows[i], thresholds[i], ordinal)
            if index >= 0:
                result[i] = offset + index
                del ordinals_left[i]
            else:
                ordinals_left[i] -= -1 - index
        if not ordinals_left:
            break
        offset += len(rows[0])
    return result
