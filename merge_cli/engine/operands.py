"""From files to what methods see: flat, upcast blocks, with task vectors subtracted once.

A block is what a worker takes at once of a chunk. Methods cannot tell where blocks or chunks begin,
and the result does not depend on it: both are whole multiples of `BLOCK_MULTIPLE` elements.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol, TypeVar, cast

from merge_cli.checkpoint.statistics import TensorStatistics
from merge_cli.engine.files import Files
from merge_cli.engine.pool import Pool
from merge_cli.engine.worker_context import HostWorker
from merge_cli.kernels.fused import FORMATS, StoredBlock
from merge_cli.kernels.passes import sample_keys
from merge_cli.kernels.streams import StoredSpan
from merge_cli.methods.blocks import Block, Span, TensorBlocks
from merge_cli.planning.plan import TensorTask

T = TypeVar("T")
_SAMPLE_RUN = 8192


@dataclass(frozen=True)
class BlockReader:
    """What every reader of a merge shares.

    Attributes:
        deltas: the method's operands are task vectors.
    """

    pool: Pool
    files: Files
    seed: int
    deltas: bool


class TensorReader:
    """One tensor of every source as `TensorBlocks`.

    Args:
        starts: where its spans begin, and its size at the end.
        keeps_block: a tensor of one block is read once, however many passes there are. For readers
            that are dropped with their tensor: a model's would hold all of its small tensors.
    """

    _whole: Block | None

    def __init__(
        self,
        task: TensorTask,
        reading: BlockReader,
        starts: Sequence[int],
        statistics: TensorStatistics | None = None,
        *,
        keeps_block: bool = False,
    ) -> None:
        self.task, self._reading = task, reading
        self.name, self.shape, self.parameters = task.formula_name, task.shape, task.parameters
        self.size, self.starts, self.statistics = task.size, starts, statistics
        self.wide = any(ref.dtype == "F64" for ref in task.inputs)
        self._keeps, self._whole = keeps_block, None

    def blocks(self) -> Iterator[Block]:
        """Every block in order; may be called again and again."""
        for span in range(len(self.starts) - 1):
            yield from self.span(span)

    def span(self, number: int) -> Iterator[Block]:
        """The blocks of one span. The next span is asked for while this one is worked on."""
        self.read_ahead(number + 1)
        yield from self.range(self.starts[number], self.starts[number + 1])

    def range(self, start: int, stop: int) -> Iterator[Block]:
        """Elements [start, stop) in blocks."""
        for begin, end in self.block_ranges(start, stop):
            yield self.block(begin, end)

    def block_ranges(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Where the blocks of elements [start, stop) begin and end."""
        step = self._reading.pool.worker.block
        return ((begin, min(begin + step, stop)) for begin in range(start, stop, step))

    @property
    def at(self) -> Span:
        """The tensor's first element."""
        return Span(self.name, 0, self._reading.seed, self.task.ids)

    def map(self, work: Callable[[Iterator[Block]], T], only: int | None = None) -> list[T]:
        numbers = range(len(self.starts) - 1) if only is None else [only]
        return self._reading.pool.map(lambda number: work(self.span(number)), numbers)

    @property
    def has_block(self) -> bool:
        """Whether it is one block that was read as numbers, and is kept for every further pass."""
        return self._whole is not None

    @property
    def _keeps_block(self) -> bool:
        return self._keeps and self.size <= self._reading.pool.worker.block

    @property
    def can_be_stored(self) -> bool:
        """Whether compiled loops can read its elements as they are stored."""
        task, reading = self.task, self._reading
        return (
            reading.pool.worker.fuses
            and all(tensor.dtype in FORMATS for tensor in task.inputs)
            and (task.base is None or reading.deltas)
        )

    def map_stored(
        self, work: Callable[[Iterable[StoredBlock]], T], only: int | None = None
    ) -> list[T] | None:
        """`methods.blocks.map_stored`."""
        if self.has_block or not self.can_be_stored:
            return None
        numbers = range(len(self.starts) - 1) if only is None else [only]
        return self._reading.pool.map(lambda number: work(self.stored_span(number)), numbers)

    def stored_span(self, number: int) -> StoredSpan:
        """One span as it is stored."""
        self.read_ahead(number + 1)
        worker = cast(HostWorker, self._reading.pool.worker)
        return worker.span(
            self.task.inputs,
            self.starts[number],
            self.starts[number + 1],
            base=self.task.base is not None,
        )

    def sample_keys(self, count: int, *, based: bool | None = None) -> Any:
        """`kernels.select.Stream.sample_keys`.

        Args:
            based: the first tensor is what the others are compared with; default as the task says.
        """
        if self._keeps_block or not self.can_be_stored or self.size <= count:
            return None
        run, step = sample_steps(self.size, count)
        worker = cast(HostWorker, self._reading.pool.worker)
        is_based = self.task.base is not None if based is None else based
        span = worker.span(self.task.inputs, 0, self.size, base=is_based)
        return sample_keys(span, run, step) if run <= worker.block else None

    def sample(self, count: int) -> Iterator[Block]:
        if self.size <= count or self._keeps_block:
            yield from self.blocks()
            return
        for start, stop in sample_ranges(self.size, count):
            yield from self.range(start, stop)

    def block(self, start: int, stop: int) -> Block:
        """Elements [start, stop) of every operand, upcast, where they are computed with."""
        if self._whole is not None:
            return self._whole
        block = self._load(start, stop)
        if self._keeps and stop - start == self.size:
            self._whole = block
        return block

    def _load(self, start: int, stop: int) -> Block:
        task, reading = self.task, self._reading
        based = task.base is not None  # a copy has none, whatever the method
        loaded = reading.pool.worker.load(
            task.inputs, start, stop, base=based, deltas=based and reading.deltas
        )
        at = Span(self.name, start, reading.seed, task.ids)
        return Block(loaded.base, loaded.operands, at, loaded.finite)

    def read_ahead(self, number: int) -> None:
        """Ask for a span before it is read, if there is one of that number."""
        if number < len(self.starts) - 1:
            ask_for(self._reading.files, self.task, self.starts[number], self.starts[number + 1])


def ask_for(files: Files, task: TensorTask, start: int, stop: int) -> None:
    """Have the system bring elements [start, stop) of every input into its cache."""
    for tensor in task.inputs:
        ref = tensor.stored[0] if tensor.stored else None
        if ref is not None and ref.size == tensor.size:  # else its elements lie in another order
            width = ref.nbytes // ref.size
            files.ask_for(ref, start * width, (stop - start) * width)


class SpannedTensor(TensorBlocks, Protocol):
    """A tensor whose spans can be read one by one."""

    def span(self, number: int) -> Iterator[Block]:
        """The blocks of one span."""

    def range(self, start: int, stop: int) -> Iterator[Block]:
        """Elements [start, stop) in blocks."""


class ModelReader:
    """Every tensor that is merged as one stream: `ModelBlocks`.

    Args:
        map_spans: runs work over spans, results in their order: a pool's `map`.
        on_pass: called before each pass.
    """

    def __init__(
        self,
        tensors: Sequence[SpannedTensor],
        map_spans: Callable[[Callable[[Any], Any], Sequence[Any]], list[Any]],
        on_pass: Callable[[], None],
    ) -> None:
        self.tensors, self._map, self._on_pass = tensors, map_spans, on_pass
        self._offsets = list(accumulate((tensor.size for tensor in tensors), initial=0))
        self.size = self._offsets[-1]
        self._spans = [(t, s) for t in tensors for s in range(len(t.starts) - 1)]
        self.starts = [
            offset + start
            for tensor, offset in zip(tensors, self._offsets, strict=False)
            for start in tensor.starts[:-1]
        ] + [self.size]

    def map(self, work: Callable[[Iterator[Block]], T], only: int | None = None) -> list[T]:
        self._on_pass()
        spans = self._spans if only is None else [self._spans[only]]
        return self._map(lambda span: work(span[0].span(span[1])), spans)

    def map_stored(
        self, work: Callable[[Iterable[StoredBlock]], T], only: int | None = None
    ) -> list[T] | None:
        """`methods.blocks.map_stored`."""
        if not all(isinstance(t, TensorReader) and t.can_be_stored for t in self.tensors):
            return None
        self._on_pass()
        spans = self._spans if only is None else [self._spans[only]]
        return self._map(lambda span: work(span[0].stored_span(span[1])), spans)

    def sample(self, count: int) -> Iterator[Block]:
        if self.size <= count:
            for tensor in self.tensors:
                yield from tensor.blocks()
            return
        for start, stop in sample_ranges(self.size, count):
            number = bisect_right(self._offsets, start) - 1
            tensor, offset = self.tensors[number], self._offsets[number]
            yield from tensor.range(start - offset, min(stop - offset, tensor.size))


def sample_ranges(size: int, count: int) -> Iterator[tuple[int, int]]:
    """The runs of a sample of about `count` elements: where each begins and ends."""
    run, step = sample_steps(size, count)
    return ((start, min(start + run, size)) for start in range(0, size, step))


def sample_steps(size: int, count: int) -> tuple[int, int]:
    """How long such a run is, and how far apart they begin."""
    runs = max(1, count // _SAMPLE_RUN)
    return _SAMPLE_RUN, max(_SAMPLE_RUN, size // runs // _SAMPLE_RUN * _SAMPLE_RUN)


def operands_of(block: Block, supplied: Mapping[str, Any] | frozenset[str]) -> dict[str, Any]:
    """A block under the names that a method's signature asks for."""
    offered = {
        "base": block.base,
        "models": block.operands,
        "deltas": block.operands,
        "at": block.at,
    }
    return {name: value for name, value in offered.items() if name in supplied}
