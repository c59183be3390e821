"""Keys (the bit patterns of magnitudes) counted by range: what `select` searches with."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from merge_cli.kernels.backend import is_numpy, kernels_for

if TYPE_CHECKING:
    import numpy as np

    Keys = np.ndarray[Any, np.dtype[Any]]


def keys(x: Any) -> Keys:
    """The key of every element, as numpy uint32 (float32) or uint64 (float64)."""
    import numpy as np

    values = x if is_numpy(x) else x.cpu().numpy()
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
    """A histogram of one span, without its empty bins: places (ascending) and counts."""

    def __init__(self, places: Keys, counts: Keys) -> None:
        self.places, self.counts = places, counts

    @classmethod
    def of(cls, dense: Keys) -> SpanCounts:
        import numpy as np

        from merge_cli.kernels import compiled

        if compiled.available():
            places = np.flatnonzero(dense)
            return cls(places.astype(np.int32), dense[places].astype(np.int64))
        places, counts = np.empty(len(dense), np.int32), np.empty(len(dense), np.int64)
        size = compiled.not_empty(dense, places, counts)
        return cls(places[:size].copy(), counts[:size].copy())

    def at(self, place: int) -> int:
        """The count of one bin."""
        import numpy as np

        i = int(np.searchsorted(self.places, place))
        return int(self.counts[i]) if i < len(self.places) and self.places[i] == place else 0

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
        return int(self.places[::-1][i]), int(from_top[i]) - inside, inside


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
            self._counts[counts.places] += counts.counts
        return counts if len(counts.places) <= room else None

    def feed(self, x: Any) -> None:
        """Count one flat block."""
        if is_numpy(x):
            self._feed_numpy(x)
        else:
            self._feed_torch(x)

    def result(self) -> tuple[int, SpanCounts]:
        """How many keys were above the range, and the histogram of those inside."""
        import numpy as np

        counts: Any = np.zeros(self._bins, np.int64) if self._counts is None else self._counts
        dense = counts if is_numpy(counts) else counts.cpu().numpy()
        return int(self._above), SpanCounts.of(dense)

    def _feed_numpy(self, x: Any) -> None:
        import numpy as np

        from merge_cli.kernels import compiled

        if self._counts is None:
            self._counts = np.zeros(self._bins, np.int32)
        low, high, shift = np.uint32(self.low), np.uint32(self.high), np.uint32(self.shift)
        self._above += compiled.count_range(x, low, high, shift, self._counts)

    def _feed_torch(self, x: Any) -> None:
        import torch

        on_gpu = kernels_for(x)
        if on_gpu is not None:
            if self._counts is None:
                self._counts = torch.zeros(self._bins, dtype=torch.int32, device=x.device)
            self._above = self._above + on_gpu.count_range(
                x, self.low, self.high, self.shift, self._counts
            )
            return
        bits = _torch_keys(x)
        # Sums stay on the device: one wait for each span, not for each block.
        self._above = self._above + (bits > self.high).sum()
        inside = bits[(bits >= self.low) & (bits <= self.high)]
        counts = torch.bincount((inside - self.low) >> self.shift, minlength=self._bins)
        self._counts = counts if self._counts is None else self._counts + counts


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
        import numpy as np

        if is_numpy(x):
            from merge_cli.kernels import compiled

            compiled.count_keys(x, np.array(self.candidates, np.uint32), self.above, self.equal)
            return
        bits = _torch_keys(x)
        self.above += np.array([int((bits > key).sum()) for key in self.candidates])
        self.equal += np.array([int((bits == key).sum()) for key in self.candidates])


def _torch_keys(x: Any) -> Any:
    import torch

    integer, width = (torch.int32, 31) if x.dtype == torch.float32 else (torch.int64, 63)
    return x.view(integer) & (2**width - 1)


def find_tie(x: Any, threshold: float, ordinal: int) -> int:
    """The index of the ordinal-th (from 1) |x| that equals the threshold, or -1 - their number."""
    if is_numpy(x):
        from merge_cli.kernels import compiled

        return int(compiled.find_tie(x, key_of(threshold), ordinal))
    ties = (x.abs() == threshold).nonzero()
    return int(ties[ordinal - 1]) if len(ties) >= ordinal else -1 - len(ties)
