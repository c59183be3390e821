"""What a merge measures: statistics of each tensor, taken from blocks that are in memory anyway.

For each tensor sums over a sample of its elements, so that the numbers of a layer or a model are
sums over tensors. For methods on task vectors the operands are deltas; otherwise they are the
weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from merge_cli.engine.device import Device
from merge_cli.engine.worker_context import WorkerContext
from merge_cli.kernels.fused import FusedForm, StoredBlock, StoredSums, measure
from merge_cli.kernels.measures import add_gram, add_signs, squares
from merge_cli.methods.blocks import Block

_MAX_PAIRS_SOURCES = 16
# The sample of a tensor: runs of elements, evenly spread. Each costs as much as 8,000 elements of a
# merge besides its own, hence few and long ones.
_SAMPLE_STRIDE = 64  # of a large tensor one run of so many
_LEAST_RUNS = 2  # of a smaller one
_SHORT_RUN, _LONG_RUN = 4096, 16_384
_LONG_FROM = 2**20  # elements of a tensor whose runs are long


@dataclass(frozen=True)
class SampleRuns:
    """Which elements of a tensor are measured: the first `run` of every `period`.

    They follow from the tensor's size alone, so that neither blocks, chunks nor threads decide.
    """

    run: int
    period: int

    @classmethod
    def of(cls, size: int) -> SampleRuns:
        """All of a tensor of fewer than 16,384 elements; one in 64 of a large one."""
        run = _LONG_RUN if size >= _LONG_FROM else _SHORT_RUN
        stride = min(_SAMPLE_STRIDE, max(1, size // (_LEAST_RUNS * run)))
        return cls(run, run * stride)

    def within(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """The parts of runs that lie in [start, stop)."""
        for begin in range(start // self.period * self.period, stop, self.period):
            first, last = max(begin, start), min(begin + self.run, stop)
            if first < last:
                yield first, last


@dataclass
class TensorStats:
    """Sums over a sample of the elements of one tensor (or of several, after `add`).

    Attributes:
        count, sampled: elements of the tensor, and those of them that the sums are over.
        gram: dot products between operands, S x S as nested lists; S x 1, each with itself, with
            more than 16 operands.
        agree, both: for each pair of operands, elements on which both are non-zero, and those of
            them with the same sign.
        conflict: elements on which some operands are positive and others negative.
        kept: for each operand, elements that trimming or dropping kept; empty if the method does
            neither.
        base, change: squared norms of the base and of (merged - base); 0 without a base.
        non_finite: for each operand, how many NaN or Inf; of all elements.
    """

    count: int = 0
    gram: list[list[float]] = field(default_factory=list)
    agree: list[list[float]] = field(default_factory=list)
    both: list[list[float]] = field(default_factory=list)
    conflict: float = 0
    sampled: int = 0
    kept: list[float] = field(default_factory=list)
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

    @property
    def estimate(self) -> TensorStats:
        """The sums over all elements, as the sample of this one tensor says."""
        factor = self.count / self.sampled if self.sampled else 1.0

        def scaled(rows: Sequence[Sequence[float]]) -> list[list[Any]]:
            return [[factor * value for value in row] for row in rows]

        return replace(
            self,
            sampled=self.count,
            gram=scaled(self.gram),
            agree=scaled(self.agree),
            both=scaled(self.both),
            conflict=factor * self.conflict,
            kept=[factor * value for value in self.kept],
            base=factor * self.base,
            change=factor * self.change,
        )

    def to_json(self) -> dict[str, Any]:
        """Fields that hold something."""
        return {name: value for name, value in vars(self).items() if value}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> TensorStats:
        return cls(**data)


CountKept = Callable[[Block], list[int]]


def measures_pairs(sources: int) -> bool:
    """Whether sources are measured against one another: each by itself where they are many."""
    return sources <= _MAX_PAIRS_SOURCES


class StatisticsMeter:
    """Measures a sample of the blocks of one chunk while they are in hand.

    Args:
        size: elements of the tensor, which decide the sample.
        kept: the method's count of what trimming or dropping keeps, if it does either.
        sums: where a loop adds up what it measures itself; None for new ones.
    """

    def __init__(
        self,
        sources: int,
        size: int,
        count_kept: CountKept | None,
        sums: StoredSums | None = None,
    ) -> None:
        self._count_kept = count_kept
        self._runs = SampleRuns.of(size)
        self._pairs = measures_pairs(sources)
        self._rates = sources > 1 and self._pairs
        self._count, self._sampled = 0, 0
        self._sums = sums or StoredSums.empty(sources)

    def add(self, block: Block, merged: Any) -> None:
        """Add one block. `merged` is the method's result, not yet rounded."""
        first = block.at.start
        for start, stop in self._sample(first, first + len(merged)):
            part = slice(start - first, stop - first)
            at = replace(block.at, start=start)
            base = None if block.base is None else block.base[part]
            self._add(Block(base, [x[part] for x in block.operands], at), merged[part])

    def _add(self, run: Block, merged: Any) -> None:
        sums = self._sums
        add_gram(run.operands, sums.gram, pairs=self._pairs)
        if run.base is not None:
            sums.squares += squares(run.base, merged)
        if self._count_kept is not None:
            sums.counts[1:] += self._count_kept(run)
        if self._rates:
            sums.counts[0] += add_signs(run.operands, sums.both, sums.agree)

    def add_stored(self, form: FusedForm, block: StoredBlock) -> None:
        """Add one block that was merged from stored bytes."""
        for start, stop in self._sample(block.start, block.start + block.size):
            part = block.part(start - block.start, stop - block.start)
            measure(form, part, self._sums, pairs=self._pairs)

    def cover(self, start: int, stop: int) -> None:
        """Count elements that a loop has measured, as far as they are sampled."""
        for _ in self._sample(start, stop):
            pass

    def _sample(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        self._count += stop - start
        for begin, end in self._runs.within(start, stop):
            self._sampled += end - begin
            yield begin, end

    def result(self) -> TensorStats:
        """The sums of every block that was added."""
        sums = self._sums
        conflict, *kept = sums.counts.tolist()
        base, change = sums.squares.tolist()
        return TensorStats(
            count=self._count,
            sampled=self._sampled,
            gram=(sums.gram if self._pairs else sums.gram.diagonal()[:, None]).tolist(),
            both=sums.both.tolist() if self._rates else [],
            agree=sums.agree.tolist() if self._rates else [],
            conflict=conflict,
            kept=kept if self._count_kept is not None else [],
            base=base,
            change=change,
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
