"""Trimming: what a threshold on magnitudes keeps of a block."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from merge_cli.kernels.backend import Array, matrix, primitive
from merge_cli.kernels.keys import key_of

ALL_TIES = 2**63 - 1


@dataclass(frozen=True)
class MagnitudeThreshold:
    """Keep |x| > threshold, and |x| = threshold up to and including flat index `last_tie`."""

    threshold: float
    last_tie: int

    def keep(self, x: Any, start: int) -> Any:
        """The boolean mask of what is kept, for a flat span (a tensor) that begins at `start`."""
        magnitude = x.abs()
        mask = magnitude > self.threshold
        ties = self.ties(start, x.numel())
        if ties:
            mask[:ties] |= magnitude[:ties] == self.threshold
        return mask

    def ties(self, start: int, size: int) -> int:
        """Of the span's elements, how many from its beginning on may be kept as ties."""
        if math.isnan(self.threshold):
            return 0  # NaN equals nothing
        return min(max(self.last_tie - start + 1, 0), size)

    @property
    def keeps_nothing(self) -> bool:
        """Whether no element is kept, whatever the magnitudes are."""
        return self.threshold == math.inf and self.last_tie == -1


Cuts = Sequence[MagnitudeThreshold | None]  # one for each row; None keeps the whole row


def trimmed(rows: Sequence[Array], cuts: Cuts, start: int) -> list[Array]:
    """Flat blocks, one for each cut, with what the cut drops set to 0."""
    if all(cut is None for cut in cuts):
        return list(rows)
    return _trim(rows, cuts, start)


@primitive()
def _trim(rows: Sequence[Array], cuts: Cuts, start: int) -> list[Array]:
    return [
        row if cut is None else row.where(cut.keep(row, start), 0.0)
        for row, cut in zip(rows, cuts, strict=True)
    ]


@_trim.compiled
def _trim_compiled(rows: Sequence[Array], cuts: Cuts, start: int) -> list[Array]:
    import numpy as np

    from merge_cli.kernels import compiled

    stacked = matrix(rows)
    size = stacked.shape[1]
    out = np.empty_like(stacked)
    thresholds = np.array([0 if cut is None else key_of(cut.threshold) for cut in cuts], np.uint32)
    ties = np.array([0 if cut is None else cut.ties(start, size) for cut in cuts], np.int64)
    compiled.trim(stacked, thresholds, ties, out)
    for row, cut, result in zip(stacked, cuts, out, strict=True):
        if cut is None:
            result[:] = row
    return list(out)


def count_kept(x: Array, cut: MagnitudeThreshold | None, start: int) -> int:
    """How many elements of a block the cut keeps."""
    return len(x) if cut is None else _count(x, cut, start)


@primitive()
def _count(x: Array, cut: MagnitudeThreshold, start: int) -> int:
    return int(cut.keep(x, start).sum())


@_count.compiled
def _count_compiled(x: Array, cut: MagnitudeThreshold, start: int) -> int:
    from merge_cli.kernels import compiled

    return int(compiled.count_kept(x, key_of(cut.threshold), cut.ties(start, len(x))))
