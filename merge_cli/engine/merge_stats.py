"""What a merge measures: statistics of each tensor, taken from blocks that are in memory anyway.

For each tensor sums over its elements, so that the numbers of a layer or a model are sums over
tensors. For methods on task vectors the operands are deltas; otherwise they are the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from merge_cli.engine.device import Device
from merge_cli.engine.worker_context import WorkerContext
from merge_cli.kernels.measures import add_gram, add_signs, squares
from merge_cli.kernels.reduce import BLOCK_MULTIPLE
from merge_cli.methods.blocks import Block

_MAX_PAIRS_SOURCES = 16
_SAMPLE_STRIDE = 16  # rates are counted on every sixteenth run of elements, which is plenty


@dataclass
class TensorStats:
    """Sums over the elements of one tensor (or of several, after `add`).

    Attributes:
        count: elements.
        gram: dot products between operands, S x S as nested lists; S x 1, each with itself, with
            more than 16 operands.
        agree, both: for each pair of operands, elements on which both are non-zero, and those of
            them with the same sign (counted on a fixed sixteenth of the elements).
        conflict, sampled: elements on which some operands are positive and others negative, and
            elements looked at (the same sixteenth).
        kept: for each operand, elements that trimming or dropping kept, of `sampled`; empty if the
            method does neither.
        base, change: squared norms of the base and of (merged - base); 0 without a base.
        non_finite: for each operand, how many NaN or Inf.
    """

    count: int = 0
    gram: list[list[float]] = field(default_factory=list)
    agree: list[list[int]] = field(default_factory=list)
    both: list[list[int]] = field(default_factory=list)
    conflict: int = 0
    sampled: int = 0
    kept: list[int] = field(default_factory=list)
    base: float = 0.0
    change: float = 0.0
    non_finite: list[int] = field(default_factory=list)

    def add(self, other: TensorStats) -> None:
        """Sum in place; both must be of the same operands."""
        self.count += other.count
        self.conflict += other.conflict
        self.sampled += other.sampled
        self.base += other.base
        self.change += other.change
        self.gram = _sum_matrix(self.gram, other.gram)
        self.agree = _sum_matrix(self.agree, other.agree)
        self.both = _sum_matrix(self.both, other.both)
        self.kept = _sum_list(self.kept, other.kept)
        self.non_finite = _sum_list(self.non_finite, other.non_finite)

    def to_json(self) -> dict[str, Any]:
        """Fields that hold something."""
        return {name: value for name, value in vars(self).items() if value}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> TensorStats:
        return cls(**data)


CountKept = Callable[[Block], list[int]]


class StatisticsMeter:
    """Measures the blocks of one chunk while they are in hand.

    Args:
        kept: the method's count of what trimming or dropping keeps, if it does either.
    """

    def __init__(self, sources: int, count_kept: CountKept | None) -> None:
        import numpy as np

        self._count_kept = count_kept
        self._pairs = sources <= _MAX_PAIRS_SOURCES
        self._sums = TensorStats()
        self._gram = np.zeros((sources, sources))
        self._both, self._agree = np.zeros((2, sources, sources), np.int64)
        self._kept_counts = np.zeros(sources, np.int64)

    def add(self, block: Block, merged: Any) -> None:
        """Add one block. `merged` is the method's result, not yet rounded."""
        sums, length = self._sums, len(merged)
        sums.count += length
        add_gram(block.operands, self._gram, pairs=self._pairs)
        if block.base is not None:
            base, change = squares(block.base, merged)
            sums.base += base
            sums.change += change
        first = block.at.start // BLOCK_MULTIPLE
        for number in range(-(-length // BLOCK_MULTIPLE)):
            # By the place in the tensor, so that the sample does not depend on how it is cut.
            if (first + number) % _SAMPLE_STRIDE == 0:
                self._add_rates(block, number * BLOCK_MULTIPLE)

    def _add_rates(self, block: Block, start: int) -> None:
        operands = [operand[start : start + BLOCK_MULTIPLE] for operand in block.operands]
        self._sums.sampled += len(operands[0])
        if self._count_kept is not None:
            at = replace(block.at, start=block.at.start + start)
            self._kept_counts += self._count_kept(Block(None, operands, at))
        if len(operands) > 1 and self._pairs:
            self._sums.conflict += add_signs(operands, self._both, self._agree)

    def result(self) -> TensorStats:
        """The sums of every block that was added."""
        rates = len(self._gram) > 1 and self._pairs
        return replace(
            self._sums,
            gram=(self._gram if self._pairs else self._gram.diagonal()[:, None]).tolist(),
            both=self._both.tolist() if rates else [],
            agree=self._agree.tolist() if rates else [],
            kept=self._kept_counts.tolist() if self._count_kept is not None else [],
        )


def _sum_list(a: Sequence[Any], b: Sequence[Any]) -> list[Any]:
    if not a or not b:
        return list(a or b)
    return [x + y for x, y in zip(a, b, strict=True)]


def _sum_matrix(a: Sequence[Sequence[Any]], b: Sequence[Sequence[Any]]) -> list[list[Any]]:
    if not a or not b:
        return [list(row) for row in (a or b)]
    return [_sum_list(x, y) for x, y in zip(a, b, strict=True)]


@dataclass(frozen=True)
class StageTime:
    """What the threads did of one kind, together; `bytes` is 0 for waiting."""

    seconds: float
    threads: int
    bytes: int


@dataclass(frozen=True)
class NodeStats:
    """What one node of a cluster did.

    Attributes:
        bytes: of output that it merged.
        peak_rss: bytes of its process.
        seconds: that it worked.
        lost: it died, and what it had not finished was done by others.
    """

    name: str
    threads: int
    bytes: int
    peak_rss: int
    seconds: float
    lost: bool


@dataclass(frozen=True)
class MergeStats:
    """What the loop did, for the report.

    Attributes:
        key: the digest of the work, by which OUT can be recognised as its result.
        arithmetic: compiled, triton or torch, and why torch.
        buffers: bytes that all workers may hold.
        stages: read, compute, write, stall.
        stats: one for each task of the plan.
        resumed: bytes of output that an earlier run had merged.
        seconds: wall time of the loop, and of the pass over the whole model before it.
        model_pass: what the method has learned of the whole model, for other shares of it.
        nodes: of a cluster, that took part.
    """

    key: str
    device: Device
    arithmetic: str
    threads: int
    buffers: int
    stages: Mapping[str, StageTime]
    stats: list[TensorStats]
    resumed: int
    seconds: float
    survey_seconds: float
    model_pass: Any = None
    nodes: tuple[NodeStats, ...] = ()


def stages(workers: Sequence[WorkerContext], threads: int, seconds: float) -> dict[str, StageTime]:
    """The workers' clocks together; what is left of the threads' time is stall."""
    clocks = [worker.clock for worker in workers]
    read, compute, write = (
        sum(getattr(clock, name) for clock in clocks) for name in ("read", "compute", "write")
    )
    bytes_read = sum(clock.bytes_read for clock in clocks)
    return {
        "read": StageTime(read, threads, bytes_read),
        "compute": StageTime(compute, threads, bytes_read),
        "write": StageTime(write, threads, sum(clock.bytes_written for clock in clocks)),
        "stall": StageTime(max(0.0, threads * seconds - read - compute - write), threads, 0),
    }
