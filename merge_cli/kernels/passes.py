"""Passes that look at stored blocks and write nothing: counts of keys, dot products.

Blocks are `StoredBlock`s; a `StoredSpan` of them is read inside the compiled loop.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

from merge_cli.kernels.fused import StoredBlock
from merge_cli.kernels.keys import KeyCounter, RangeCounter, key_of
from merge_cli.kernels.streams import StoredSpan


def count_blocks(
    counters: Mapping[int, RangeCounter | KeyCounter], blocks: Iterable[StoredBlock]
) -> None:
    """Feed every counter with its source, or task vector, of each block.

    Args:
        counters: by source; new ones.
    """
    import numpy as np

    from merge_cli.kernels import compiled

    most = max(len(c.candidates) if isinstance(c, KeyCounter) else 1 for c in counters.values())
    candidates = np.zeros((len(counters), most), np.uint32)
    ranges = np.zeros((len(counters), 4), np.uint32)
    above, equal = np.zeros((2, len(counters), most), np.int64)
    bins = max(c.bins if isinstance(c, RangeCounter) else 1 for c in counters.values())
    counts = np.zeros((len(counters), bins), np.int32)
    for n, counter in enumerate(counters.values()):
        if isinstance(counter, KeyCounter):
            ranges[n, 3] = len(counter.candidates)
            candidates[n, : len(counter.candidates)] = counter.candidates
        else:
            ranges[n] = counter.low, counter.high, counter.shift, 0
    tables = np.array([*counters], np.int64), ranges, candidates, above, equal, counts

    def stream(*span: Any) -> int:
        *inputs, spent = span
        address = compiled.count_stored.address
        done: int = compiled.count_stream(address, *inputs, *tables, time.CLOCK_MONOTONIC, spent)
        return done

    for block in _left(blocks, stream):
        compiled.count_stored(*block.inputs, *tables)
    for n, counter in enumerate(counters.values()):
        if isinstance(counter, KeyCounter):
            counter.above += above[n, : len(counter.above)]
            counter.equal += equal[n, : len(counter.equal)]
        else:
            counter.set(int(above[n, 0]), counts[n, : counter.bins])


def sample_keys(span: StoredSpan, run: int, step: int) -> Any:
    """The keys of the first `run` of every `step` elements: numpy uint32 [sources, elements].

    None where not all of them can be read in one loop.
    """
    import numpy as np

    from merge_cli.kernels import compiled

    if span.inputs is None:
        return None
    inputs, size, spent = np.array(span.inputs, np.int64), span.stop, np.zeros(4)
    whole, rest = divmod(size, step)
    count = whole * run + min(rest, run)
    # Float32, as which its rows are one matrix for `kth_largest`.
    sampled = np.empty((len(inputs) - span.based, count), np.float32).view(np.uint32)
    address, where = compiled.keys_stored.address, (span.buffer, span.based, inputs)
    read: int = compiled.sample_stream(
        address, *where, size, step, run, sampled, time.CLOCK_MONOTONIC, spent
    )
    span.on_spent(spent, False)
    return sampled if read == count else None


def find_ties(
    blocks: Iterable[StoredBlock], thresholds: Mapping[int, float], ordinals: Mapping[int, int]
) -> dict[int, int]:
    """For some sources an element that equals a threshold: how many lie before it in the blocks.

    Args:
        ordinals: by source: which of the elements that equal its threshold, from 1. It is there.
    """
    import numpy as np

    from merge_cli.kernels import compiled

    operands, left = np.array([*ordinals], np.int64), np.array([*ordinals.values()], np.int64)
    sought = np.array([key_of(thresholds[i]) for i in ordinals], np.uint32)
    indexes = np.zeros(len(ordinals), np.int64)
    passed = 0

    def stream(*span: Any) -> int:
        nonlocal passed
        *inputs, begin, stop, spent = span
        tables = operands, sought, left, indexes, begin - passed
        address = compiled.find_stored.address
        done: int = compiled.find_stream(
            address, *inputs, begin, stop, *tables, time.CLOCK_MONOTONIC, spent
        )
        passed += done - begin
        return done

    for block in _left(blocks, stream):
        if not compiled.find_stored(*block.inputs, operands, sought, left, passed, indexes):
            break
        passed += block.size
    return dict(zip(ordinals, indexes.tolist(), strict=True))


def dot_products(blocks: Iterable[StoredBlock], run: int) -> list[list[float]]:
    """Of every pair (i, j), i <= j, of sources or task vectors, over each run of each block."""
    import numpy as np

    from merge_cli.kernels import compiled

    sums: list[Any] = []

    def stream(*span: Any) -> int:
        buffer, block, based, inputs, begin, stop, spent = span
        pairs, runs = _pairs(len(inputs) - based), -(-min(block, stop - begin) // run)
        products = np.zeros((-(-(stop - begin) // block), pairs, runs))
        where = buffer, block, based, inputs, begin, stop
        done: int = compiled.dot_stream(
            compiled.dot_stored.address, *where, run, products, time.CLOCK_MONOTONIC, spent
        )
        # Of a run that the last block does not have, the sum is 0.
        sums.extend(products[: -(-(done - begin) // block)])
        return done

    for block in _left(blocks, stream):
        pairs = _pairs(len(block.starts) - block.based)
        products = np.empty((pairs, -(-block.size // run)))
        compiled.dot_stored(*block.inputs, run, products)
        sums.append(products)
    return [[x for part in pair for x in part.tolist()] for pair in zip(*sums, strict=True)]


def _pairs(sources: int) -> int:
    return sources * (sources + 1) // 2


def _left(blocks: Iterable[StoredBlock], stream: Any) -> Iterable[StoredBlock]:
    """The blocks that are left when a loop has read as many as it can by itself."""
    return blocks.left_by(stream) if isinstance(blocks, StoredSpan) else blocks
