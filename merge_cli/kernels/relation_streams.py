"""Loops that read by themselves and compare: how sources relate, and samples of their changes.

As in `kernels.streams`, one call goes through many spans, and what cannot be read or is not finite
is left to the plain way.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from merge_cli.kernels.measures import Relations, least_keys, top_count
from merge_cli.kernels.streams import Stored


@dataclass(frozen=True)
class Runs:
    """Elements of a tensor in runs of `length`, each from one of `firsts` on."""

    firsts: Sequence[int]
    length: int


class RelationStreams:
    """Spans of tensors whose sources are related: see `kernels.measures`.

    Args:
        inputs: of each span, as many each; the first one is what the others are compared with.
        spans: the elements [start, stop) of each.
        share: of a source's elements, those that count as its largest changes.
        thresholds: for each source, the magnitude from which on a change counts as one of them;
            None where each span is a whole tensor of at most a block, and `share` decides.
    """

    def __init__(
        self,
        inputs: Sequence[Sequence[Stored]],
        spans: Sequence[tuple[int, int]],
        share: float,
        thresholds: Sequence[float] | None = None,
    ) -> None:
        import numpy as np

        self._inputs, self._spans = np.array(inputs, np.int64), np.array(spans, np.int64)
        self._sizes = [stop - start for start, stop in spans]
        ranks = [0 if thresholds else top_count(size, share) for size in self._sizes]
        self._ranks = np.array(ranks, np.int64)
        sources = len(inputs[0]) - 1
        self._least = np.zeros((len(spans), sources), np.uint32)
        if thresholds:
            self._least[:] = least_keys(thresholds)
        self._sums = Relations.empty(sources, len(spans))

    def run(self, first: int, buffer: Any, block: int, spent: Any) -> int:
        """`Streams.run`; the sums of a span that stops are of no use."""
        import numpy as np

        from merge_cli.kernels import compiled

        sums = self._sums
        kernels = compiled.kth_largest, compiled.gram, compiled.count_relations
        number: int = compiled.relate_streams(
            np.array([kernel.address for kernel in kernels], np.int64),
            buffer,
            block,
            self._inputs,
            self._spans,
            self._ranks,
            self._least,
            sums.gram,
            sums.both,
            sums.agree,
            sums.equal,
            sums.large,
            sums.steps,
            sums.contest,
            first,
            time.CLOCK_MONOTONIC,
            spent,
        )
        return number

    def sums(self) -> Iterator[Relations]:
        """Of each span."""
        return self._sums.each(self._sizes)


def read_sample(
    inputs: Sequence[Stored], runs: Runs, columns: Sequence[int], buffer: Any, spent: Any
) -> Any:
    """Some columns of some runs of a tensor: the others' less those of the first.

    Args:
        buffer: room for a run of every input, numpy uint8.
        spent: see `Streams.run`.

    Returns:
        numpy float32 [inputs - 1, runs, columns]; None where not all of them can be read.
    """
    import numpy as np

    from merge_cli.kernels import compiled

    changes = np.empty((len(inputs) - 1, len(runs.firsts), len(columns)), np.float32)
    where = np.array(inputs, np.int64), np.array(runs.firsts, np.int64), runs.length
    chosen = np.array(columns, np.int64)
    done = compiled.read_sample(buffer, *where, chosen, changes, time.CLOCK_MONOTONIC, spent)
    return changes if done else None
