"""Keys (the bit patterns of magnitudes) counted by range: what `select` searches with.

IEEE numbers of one sign are ordered as their bit patterns are: |x| < |y| exactly when the pattern
of |x|, taken for an integer, is the smaller one. So the search for a magnitude counts integers,
which is exact and may be done in any order. Zeros of both signs have key 0; a NaN has a key above
that of Inf.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from merge_cli.kernels.backend import Array, host_primitive, primitive, to_numpy

if TYPE_CHECKING:
    import numpy as np

    Keys = np.ndarray[Any, np.dtype[Any]]


def keys(x: Any) -> Keys:
    """The key of every element, as numpy uint32 (float32) or uint64 (float64)."""
    import numpy as np

    values = to_numpy(x)
    unsigned = np.dtype(f"u{values.itemsize}")
    bits: Keys = values.view(unsigned) & unsigned.type(2 ** (8 * values.itemsize - 1) - 1)
    return bits


def key_of(value: float) -> Any:
    """The key of one float32 number."""
    import numpy as np

    return np.float32(value).view(np.uint32) & np.uint32(0x7FFFFFFF)


def number(key: int, width: int) -> float:
    """The magnitude that has this key; `width` is 31 (float32) or 63 (float64)."""
    import numpy as np

    if width == 31:
        return float(np.uint32(key).view(np.float32))
    return float(np.uint64(key).view(np.float64))


class SpanCounts:
    """A histogram of one span, without its empty bins: which bins (ascending), and counts."""

    def __init__(self, bins: Keys, counts: Keys) -> None:
        self.bins, self.counts = bins, counts

    @classmethod
    def of(cls, dense: Keys) -> SpanCounts:
        return cls(*_filled_bins(dense))

    def at(self, index: int) -> int:
        """The count of one bin."""
        import numpy as np

        i = int(np.searchsorted(self.bins, index))
        return int(self.counts[i]) if i < len(self.bins) and self.bins[i] == index else 0

    def bin_of_rank(self, rank: int) -> tuple[int, int, int] | None:
        """Where the rank-th largest is: (bin, how many lie in higher bins, how many in it).

        None if there are fewer than `rank` in all bins.
        """
        import numpy as np

        from_top = np.cumsum(self.counts[::-1])
        i = int(np.searchsorted(from_top, rank))
        if i == len(from_top):
            return None
        inside = int(self.counts[::-1][i])
        return int(self.bins[::-1][i]), int(from_top[i]) - inside, inside


class RangeCounter:
    """Counts keys in [low, high] by (key - low) >> shift, and those above `high`.

    One counter belongs to one thread; `add` may be called from several.
    """

    def __init__(self, low: int, high: int, shift: int) -> None:
        self.low, self.high, self.shift = low, high, shift
        self._bins = ((high - low) >> shift) + 1
        self._above: Any = 0
        self._counts: Any = None
        self._lock = threading.Lock()

    def empty_copy(self) -> RangeCounter:
        """Another counter of the same range."""
        return RangeCounter(self.low, self.high, self.shift)

    def add(self, span: RangeCounter, room: int) -> SpanCounts | None:
        """Add the counts of one span.

        Returns:
            them by themselves, if they fill at most `room` bins.
        """
        import numpy as np

        above, counts = span.result()
        with self._lock:
            if self._counts is None:
                self._counts = np.zeros(self._bins, np.int64)
            self._above += above
            self._counts[counts.bins] += counts.counts
        return counts if len(counts.bins) <= room else None

    def feed(self, x: Any) -> None:
        """Count one flat block."""
        if self._counts is None:
            self._counts = _empty_bins(x, self._bins)
        # The sum stays on the device: one wait for each span, not for each block.
        self._above = self._above + count_range(x, self.low, self.high, self.shift, self._counts)

    @property
    def bins(self) -> int:
        """How many bins there are."""
        return self._bins

    def set(self, above: int, counts: Keys) -> None:
        """What was counted in another way; `counts` has a number for each bin."""
        self._above, self._counts = above, counts

    def result(self) -> tuple[int, SpanCounts]:
        """How many keys were above the range, and the histogram of those inside."""
        import numpy as np

        counts: Any = np.zeros(self._bins, np.int64) if self._counts is None else self._counts
        return int(self._above), SpanCounts.of(to_numpy(counts))


class KeyCounter:
    """Counts, for each of a few keys, the elements that equal it and those that are above it."""

    def __init__(self, candidates: Sequence[int]) -> None:
        import numpy as np

        self.candidates = list(candidates)
        self.above = np.zeros(len(candidates), np.int64)
        self.equal = np.zeros(len(candidates), np.int64)
        self._lock = threading.Lock()

    def empty_copy(self) -> KeyCounter:
        """Another counter of the same keys."""
        return KeyCounter(self.candidates)

    def add(self, span: KeyCounter, room: int) -> SpanCounts:
        """Add the counts of one span, and return them by themselves: they are few."""
        with self._lock:
            self.above += span.above
            self.equal += span.equal
        return SpanCounts.of(span.equal)

    def feed(self, x: Any) -> None:
        """Count one flat block."""
        _count_keys(x, self.candidates, self.above, self.equal)


@host_primitive
def _filled_bins(dense: Keys) -> tuple[Keys, Keys]:
    """The bins that are not empty, ascending, and their counts."""
    import numpy as np

    bins = np.flatnonzero(dense)
    return bins.astype(np.int32), dense[bins].astype(np.int64)


@_filled_bins.compiled
def _filled_bins_compiled(dense: Keys) -> tuple[Keys, Keys]:
    import numpy as np

    from merge_cli.kernels import compiled

    bins, counts = np.empty(len(dense), np.int32), np.empty(len(dense), np.int64)
    size = compiled.not_empty(dense, bins, counts)
    return bins[:size].copy(), counts[:size].copy()


@primitive()
def _empty_bins(x: Array, bins: int) -> Array:
    """Zeros to count the keys of blocks like `x` in, where `x` lies."""
    import torch

    return torch.zeros(bins, dtype=torch.int32, device=x.device)


@_empty_bins.compiled
def _empty_bins_numpy(x: Array, bins: int) -> Array:
    import numpy as np

    return np.zeros(bins, np.int32)


@primitive()
def count_range(x: Array, low: int, high: int, shift: int, counts: Array) -> Any:
    """Add 1 to counts[(key - low) >> shift] for each key of a flat block from low to high.

    Args:
        counts: int32, from `_empty_bins`; no bin may reach 2^31.

    Returns:
        how many keys are above `high`: a number, or an array of one on the device of `x`.
    """
    import torch

    bits = _torch_keys(x)
    inside = bits[(bits >= low) & (bits <= high)]
    counts += torch.bincount((inside - low) >> shift, minlength=len(counts))
    return (bits > high).sum()


@count_range.compiled
def _count_range_compiled(x: Array, low: int, high: int, shift: int, counts: Array) -> Any:
    import numpy as np

    from merge_cli.kernels import compiled

    return compiled.count_range(x, np.uint32(low), np.uint32(high), np.uint32(shift), counts)


@count_range.triton
def _count_range_triton(x: Array, low: int, high: int, shift: int, counts: Array) -> Any:
    from merge_cli.kernels import triton_kernels

    return triton_kernels.count_range(x, low, high, shift, counts)


@primitive()
def _count_keys(x: Array, candidates: Sequence[int], above: Keys, equal: Keys) -> None:
    """For each candidate, add to `above` and `equal` how many keys of a flat block are so."""
    import numpy as np

    bits = _torch_keys(x)
    above += np.array([int((bits > key).sum()) for key in candidates])
    equal += np.array([int((bits == key).sum()) for key in candidates])


@_count_keys.compiled
def _count_keys_compiled(x: Array, candidates: Sequence[int], above: Keys, equal: Keys) -> None:
    import numpy as np

    from merge_cli.kernels import compiled

    compiled.count_keys(x, np.array(candidates, np.uint32), above, equal)


@primitive()
def find_tie(x: Array, threshold: float, ordinal: int) -> int:
    """The index of the ordinal-th (from 1) |x| that equals the threshold, or -1 - their number."""
    ties = (x.abs() == threshold).nonzero()
    return int(ties[ordinal - 1]) if len(ties) >= ordinal else -1 - len(ties)


@find_tie.compiled
def _find_tie_compiled(x: Array, threshold: float, ordinal: int) -> int:
    from merge_cli.kernels import compiled

    return int(compiled.find_tie(x, key_of(threshold), ordinal))


def few_keys(sample: Keys, low: int, high: int, most: int) -> list[int]:
    """The distinct keys of a sample (numpy) from low to high, ascending; none if more than `most`.

    Args:
        sample: uint32 or uint64.
    """
    import numpy as np

    if sample.itemsize > 4:
        distinct = np.unique(sample[(sample >= low) & (sample <= high)])
        return distinct.tolist() if len(distinct) <= most else []
    distinct = np.empty(most, np.uint32)
    count = _distinct_keys(sample, low, high, distinct)
    return sorted(distinct[:count].tolist()) if count <= most else []


@host_primitive
def _distinct_keys(sample: Keys, low: int, high: int, distinct: Keys) -> int:
    """Fill `distinct` with the keys from low to high; how many, or one more than have room."""
    import numpy as np

    keys = np.unique(sample[(sample >= low) & (sample <= high)])
    distinct[: len(keys)] = keys[: len(distinct)]
    return min(len(keys), len(distinct) + 1)


@_distinct_keys.compiled
def _distinct_keys_compiled(sample: Keys, low: int, high: int, distinct: Keys) -> int:
    import numpy as np

    from merge_cli.kernels import compiled

    return int(compiled.distinct_keys(sample, np.uint32(low), np.uint32(high), distinct))


def _torch_keys(x: Any) -> Any:
    import torch

    integer, width = (torch.int32, 31) if x.dtype == torch.float32 else (torch.int64, 63)
    return x.view(integer) & (2**width - 1)
