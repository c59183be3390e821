"""Loops that read and write by themselves: a whole chunk, or many small tensors, in one call.

A call of `kernels.compiled.streams` takes Python's lock when it begins and when it ends, so that
threads hardly wait for one another. What cannot be read or written, and what is not a finite
number, ends it at that block, which is left to the plain way.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from merge_cli.kernels.cut import ALL_TIES, MagnitudeThreshold
from merge_cli.kernels.fused import DIVISORS, FusedForm, Masks, Ranks, StoredBlock, StoredSums
from merge_cli.kernels.mask import WORDS

# An open file, the byte at which a tensor begins, and the format of its elements (`FORMATS`).
Stored = tuple[int, int, int]


class Streams(Protocol):
    """Tensors that one call goes through."""

    def run(self, first: int, buffer: Any, block: int, spent: Any) -> int:
        """Go through them, from number `first` on.

        Args:
            buffer: room for a block of every input and of a result, numpy uint8.
            block: elements.
            spent: float64 [4]; seconds of reading and writing, and bytes read and written, are
                added.

        Returns:
            the number of the one that stopped, or how many there are.
        """


@dataclass(frozen=True)
class MergeJob:
    """Elements [start, stop) of one tensor, and where they go.

    Attributes:
        inputs: the base first, if there is one.
        run, period: the first `run` elements of every `period` are measured; 0 for none.
        is_loaded: all of it lies in the buffer: see `StoredSpan.on_spent`.
    """

    form: FusedForm
    inputs: Sequence[Stored]
    target: Stored
    start: int
    stop: int
    run: int
    period: int
    is_loaded: bool = False

    @property
    def has_one_key(self) -> bool:
        """Whether one key gives the masks of all elements: else they are left to the plain way."""
        return self.start // WORDS == max(self.start, self.stop - 1) // WORDS


class MergeStreams:
    """Jobs as the compiled loop takes them: a row of each table for each.

    Args:
        jobs: with as many inputs each.
        based: the first input of each is the base.
        pairs: sources are measured against one another, not each by itself.

    Attributes:
        sums: what was measured, of each job.
    """

    def __init__(self, jobs: Sequence[MergeJob], *, based: bool, pairs: bool) -> None:
        import numpy as np

        from merge_cli.kernels import compiled

        forms = [job.form for job in jobs]
        sources = len(jobs[0].inputs) - based
        self.based, self._pairs = based, pairs
        self._jobs = np.array([_choices(job) for job in jobs], np.int64)
        self._inputs = np.array([job.inputs for job in jobs], np.int64)
        self._numbers = np.array([_numbers(form) for form in forms], np.float32)
        self._weights = np.array([form.weights for form in forms], np.float32)
        ones = [1.0] * sources
        self._factors = np.array([form.factors or ones for form in forms], np.float32)
        rules = [job.form.rule_rows(job.start // WORDS) or [(0, 0, 0, 1)] * sources for job in jobs]
        self._rules = np.array(rules, np.uint32)
        self._ties = np.array([_ties(form, sources) for form in forms], np.int64)
        self._ks = np.array([_ranks(form, sources) for form in forms], np.int64)
        self.sums = StoredSums.empty(sources, len(jobs))
        elects = [form.election is not None for form in forms]
        ranks = any(isinstance(form.drop, Ranks) for form in forms)
        kernels = [
            (compiled.merge_linear, not all(elects)),
            (compiled.merge_disjoint, any(elects)),
            (compiled.measure_stored, any(job.run for job in jobs)),
            (compiled.rank_stored, ranks),
            (compiled.kth_largest, ranks),
        ]
        self._addresses = np.array([k.address if used else 0 for k, used in kernels], np.int64)

    def run(self, first: int, buffer: Any, block: int, spent: Any) -> int:
        """`Streams.run`: merge the jobs, each from where it has stopped."""
        from merge_cli.kernels import compiled

        sums = self.sums
        number: int = compiled.merge_streams(
            self._addresses,
            buffer,
            block,
            self.based,
            self._jobs,
            self._inputs,
            self._numbers,
            self._weights,
            self._factors,
            self._rules,
            self._ties,
            self._ks,
            sums.gram,
            sums.both,
            sums.agree,
            sums.counts,
            sums.squares,
            self._pairs,
            first,
            time.CLOCK_MONOTONIC,
            spent,
        )
        return number

    def begin_of(self, job: int) -> int:
        """The element at which a job goes on."""
        return int(self._jobs[job, 0])

    def skip_to(self, job: int, element: int) -> None:
        """Leave a job's elements before this one out."""
        self._jobs[job, 0] = element


def _choices(job: MergeJob) -> list[int]:
    """A row of `jobs`, in the order of its columns."""
    form = job.form
    drops = 0 if form.drop is None else 1 if isinstance(form.drop, Masks) else 2
    row = [job.start, job.stop, *job.target, job.run, job.period, job.is_loaded, drops]
    if form.election is None:
        return [*row, 0, 0, 0]
    return [*row, 1, form.election.weighted, DIVISORS[form.election.divide_by]]


def _numbers(form: FusedForm) -> tuple[float, float, float]:
    return form.divisor, form.scale, form.election.zero_sign if form.election else 0.0


def _ties(form: FusedForm, sources: int) -> list[int]:
    """How many elements of a tensor, from its first on, may be kept as ties of each cut."""
    if form.drop is None or isinstance(form.drop, Masks | Ranks):
        return [0] * sources
    return [0 if cut is None else _tie_end(cut) for cut in form.drop]


def _tie_end(cut: MagnitudeThreshold) -> int:
    return 0 if math.isnan(cut.threshold) else min(cut.last_tie, ALL_TIES - 1) + 1


def _ranks(form: FusedForm, sources: int) -> list[int]:
    if not isinstance(form.drop, Ranks):
        return [0] * sources
    return [count or 0 for count in form.drop.counts]


@dataclass(frozen=True)
class StoredSpan:
    """Elements [start, stop) of every input, for loops that look at each block once.

    Attributes:
        inputs: where they lie; None where some of them are computed from what is stored.
        buffer: room for a block of every input, numpy uint8.
        load: reads elements [begin, end) otherwise.
        on_spent: gets what a loop has spent, see `Streams.run`; and whether it has left all
            elements in the buffer, as `MergeStreams` lays them out there.
    """

    start: int
    stop: int
    based: bool
    inputs: Sequence[Stored] | None
    buffer: Any
    block: int
    load: Callable[[int, int], StoredBlock]
    on_spent: Callable[[Any, bool], None]

    def __iter__(self) -> Iterator[StoredBlock]:
        """Every block, each until the next is asked for."""
        return self.left_by(None)

    def left_by(self, stream: Callable[..., int] | None) -> Iterator[StoredBlock]:
        """The blocks that a loop leaves over, which reads by itself.

        Args:
            stream: stream(buffer, block, based, inputs, begin, stop, spent) -> where it stopped.
        """
        import numpy as np

        begin = self.start
        inputs = None if self.inputs is None else np.array(self.inputs, np.int64)
        while begin < self.stop:
            if stream is not None and inputs is not None:
                spent = np.zeros(4)
                begin = stream(self.buffer, self.block, self.based, inputs, begin, self.stop, spent)
                is_one_block = self.stop - self.start <= self.block
                self.on_spent(spent, is_one_block and begin == self.stop)
            if begin < self.stop:
                end = min(begin + self.block, self.stop)
                yield self.load(begin, end)
                begin = end
