"""Loops that read and write by themselves, against the loops over blocks that are in memory."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from merge_cli.checkpoint.dtypes import width_of
from merge_cli.kernels import fused, passes
from merge_cli.kernels.convert import encode_into
from merge_cli.kernels.cut import MagnitudeThreshold
from merge_cli.kernels.fused import FORMATS, Election, FusedForm, Masks, Ranks, StoredBlock
from merge_cli.kernels.keys import keys
from merge_cli.kernels.kth_largest import kth_largest
from merge_cli.kernels.measures import Relations, add_relations, top_threshold
from merge_cli.kernels.relation_streams import RelationStreams, Runs, read_sample
from merge_cli.kernels.streams import MergeJob, MergeStreams, Stored, StoredSpan
from tests.support.stored import DTYPES, block_of, decoded, stored_rows

BLOCK = 2048
SIZES = (1, 63, 2047, 2048, 2049, 9000)
NO_RUNS, RUNS = (0, 1), (300, 700)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """As inside a worker: numbers that overflow are no warning."""
    with np.errstate(all="ignore"):
        yield


@dataclass
class Files:
    """Inputs in one file and outputs in another, behind some other bytes."""

    folder: Path
    reading: int
    writing: int
    buffer: Any

    def put(self, rows: list[np.ndarray], dtypes: list[str]) -> list[Stored]:
        inputs = []
        for raw, dtype in zip(rows, dtypes, strict=True):
            end = os.fstat(self.reading).st_size + 3
            os.pwrite(self.reading, raw.tobytes(), end)
            inputs.append((self.reading, end, FORMATS[dtype]))
        return inputs

    def target(self, size: int, dtype: str) -> Stored:
        start = os.fstat(self.writing).st_size
        os.ftruncate(self.writing, start + size * width_of(dtype) + 5)
        return self.writing, start, FORMATS[dtype]

    def written(self, target: Stored, size: int, dtype: str) -> bytes:
        return os.pread(self.writing, size * width_of(dtype), target[1])


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Files]:
    reading, writing = (
        os.open(tmp_path / name, os.O_RDWR | os.O_CREAT) for name in ("inputs", "outputs")
    )
    yield Files(tmp_path, reading, writing, np.zeros(8 * BLOCK * 8, np.uint8))
    os.close(reading)
    os.close(writing)


def form_of(draw: Any, sources: int, start: int) -> FusedForm:
    """Any formula over sources with a base."""
    weight = [draw(st.sampled_from([1.0, 0.7, -0.3])) for _ in range(sources)]
    density = [draw(st.sampled_from([0.5, 1.0, 0.0])) for _ in range(sources)]
    thresholds, ties = st.sampled_from([0.0, 0.01, math.inf, math.nan]), st.integers(-1, 10_000)
    cuts = [
        draw(st.one_of(st.none(), st.builds(MagnitudeThreshold, thresholds, ties)))
        for _ in range(sources)
    ]
    masks = Masks(7, range(sources), "layers.3.weight", density)
    if draw(st.booleans()):
        return FusedForm(weight, 2.0, 0.5, draw(st.sampled_from([None, masks])))
    divide_by = draw(st.sampled_from(["nothing", "weights", "count"]))
    election = Election(draw(st.booleans()), divide_by, draw(st.sampled_from([1.0, -1.0, 0.0])))
    factors = draw(st.sampled_from([None, [1.5] * sources]))
    drop = draw(st.sampled_from([None, masks, cuts]))
    return FusedForm(weight, 1.0, 0.5, drop, factors, election)


def by_blocks(
    form: FusedForm, rows: list[np.ndarray], dtypes: list[str], start: int, out_dtype: str
) -> np.ndarray | None:
    size = len(rows[0]) // width_of(dtypes[0])
    out = np.empty(size * width_of(out_dtype), np.uint8)
    block = block_of(rows, dtypes, start, based=True)
    return out if fused.merge(form, block, out_dtype, out) else None


@settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data(), seed=st.integers(0, 2**32), count=st.integers(1, 3))
def test_jobs_are_merged_as_blocks_are(files: Files, data: Any, seed: int, count: int) -> None:
    """Several tensors in one call, each in as many blocks as it has; and what is measured."""
    draw, rng = data.draw, np.random.default_rng(seed)
    sources = draw(st.integers(1, 3))
    jobs, expected, sums = [], [], []
    for _ in range(count):
        size, start = draw(st.sampled_from(SIZES)), draw(st.sampled_from([0, 65_536, 2**32 + 64]))
        dtypes = [draw(st.sampled_from(DTYPES)) for _ in range(sources + 1)]
        out_dtype, form = draw(st.sampled_from(["BF16", "F32"])), form_of(draw, sources, start)
        rows = stored_rows(rng, dtypes, size)
        inputs = [
            (file, offset - start * width_of(dtype), kind)
            for (file, offset, kind), dtype in zip(files.put(rows, dtypes), dtypes, strict=True)
        ]
        target = files.target(size, out_dtype)
        moved = target[0], target[1] - start * width_of(out_dtype), target[2]
        jobs.append(MergeJob(form, inputs, moved, start, start + size, *RUNS))
        expected.append((target, size, out_dtype, by_blocks(form, rows, dtypes, start, out_dtype)))
        sums.append(measured(form, rows, dtypes, start))
    streams, spent = MergeStreams(jobs, based=True, pairs=True), np.zeros(4)
    assert streams.run(0, files.buffer, BLOCK, spent) == count
    for target, size, out_dtype, out in expected:
        assert out is not None
        assert files.written(target, size, out_dtype) == out.tobytes()
    for of_job, of_blocks in zip(streams.sums.each(), sums, strict=True):
        for name in ("both", "agree", "counts"):
            np.testing.assert_array_equal(getattr(of_job, name), getattr(of_blocks, name))
        for name in ("gram", "squares"):
            np.testing.assert_allclose(
                getattr(of_job, name), getattr(of_blocks, name), rtol=1e-4, atol=1e-30
            )
    assert spent[2] == sum(
        (job.stop - job.start) * (2 if kind != FORMATS["F32"] else 4)
        for job in jobs
        for _, _, kind in job.inputs
    )


def measured(
    form: FusedForm, rows: list[np.ndarray], dtypes: list[str], start: int
) -> fused.StoredSums:
    block = block_of(rows, dtypes, start, based=True)
    sums, (run, period) = fused.StoredSums.empty(len(rows) - 1), RUNS
    for begin in range(start // period * period, start + block.size, period):
        first, last = max(begin, start), min(begin + run, start + block.size)
        if first < last:
            fused.measure(form, block.part(first - start, last - start), sums, pairs=True)
    return sums


@pytest.mark.parametrize("size", [1, 2, 63, 1500, 2048])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuts_are_found_in_the_loop(files: Files, size: int, dtype: str) -> None:
    """Exactly as many are kept as by cuts that are known before, ties to the lower index."""
    dtypes = [dtype, "BF16", "F32", dtype, "BF16"]
    rows = stored_rows(np.random.default_rng(size), dtypes, size)
    values = decoded(rows, dtypes)
    counts = [size // 2 or 1, None, 0, size // 3 or 1]
    known: list[MagnitudeThreshold | None] = []
    for row, k in zip(values[1:], counts, strict=True):
        if k is None or k == 0:
            known.append(None if k is None else MagnitudeThreshold(math.inf, -1))
        else:
            ((key, last),) = kth_largest([row - values[0]], [k])
            known.append(MagnitudeThreshold(float(np.uint32(key).view(np.float32)), last))
    election = Election(weighted=True, divide_by="weights")
    form = FusedForm([1.0, 0.5, 1.0, 0.7], drop=Ranks(counts), election=election)
    inputs, target = files.put(rows, dtypes), files.target(size, "F32")
    streams = MergeStreams(
        [MergeJob(form, inputs, target, 0, size, *NO_RUNS)], based=True, pairs=True
    )
    assert streams.run(0, files.buffer, BLOCK, np.zeros(4)) == 1
    given = FusedForm(form.weights, drop=known, election=election)
    out = by_blocks(given, rows, dtypes, 0, "F32")
    assert out is not None
    assert files.written(target, size, "F32") == out.tobytes()


def soup_jobs(files: Files, spoil: Callable[[np.ndarray], None]) -> tuple[list[MergeJob], Any]:
    """Two tensors of 9,000 elements, of which the second one is spoilt."""
    jobs, rows = [], [[np.full(9000, 2.0, np.float32)] * 2, [np.ones(9000, np.float32)] * 2]
    spoilt = rows[1][0].copy()
    spoil(spoilt)
    rows[1] = [spoilt, rows[1][1]]
    for pair in rows:
        raws = []
        for values in pair:
            raw = np.empty(4 * len(values), np.uint8)
            encode_into(values, "F32", raw)
            raws.append(raw)
        inputs, target = files.put(raws, ["F32", "F32"]), files.target(9000, "F16")
        jobs.append(MergeJob(FusedForm([1.0, 1.0]), inputs, target, 0, 9000, *NO_RUNS))
    return jobs, rows


@pytest.mark.parametrize("value", [math.nan, math.inf, 65_520.0])
def test_a_loop_stops_at_what_the_plain_way_has_to_see_and_goes_on(
    files: Files, value: float
) -> None:
    def spoil(values: np.ndarray) -> None:
        values[5000] = value

    jobs, _ = soup_jobs(files, spoil)
    streams = MergeStreams(jobs, based=False, pairs=True)
    assert streams.run(0, files.buffer, BLOCK, np.zeros(4)) == 1
    assert streams.begin_of(1) == 2 * BLOCK
    streams.skip_to(1, 3 * BLOCK)
    assert streams.run(1, files.buffer, BLOCK, np.zeros(4)) == 2
    halves = np.frombuffer(files.written(jobs[1].target, 9000, "F16"), np.float16)
    skipped = np.zeros(9000, bool)
    skipped[2 * BLOCK : 3 * BLOCK] = True
    assert (halves[~skipped] == 2).all()
    assert (halves[skipped] == 0).all()


def test_a_file_that_ends_early_stops_the_loop(files: Files) -> None:
    jobs, _ = soup_jobs(files, lambda values: None)
    os.ftruncate(files.reading, jobs[1].inputs[1][1] + 4 * 9000 - 1)
    streams = MergeStreams(jobs, based=False, pairs=True)
    assert streams.run(0, files.buffer, BLOCK, np.zeros(4)) == 1
    assert streams.begin_of(1) == 4 * BLOCK


def test_a_file_that_cannot_be_written_stops_the_loop(files: Files) -> None:
    jobs, _ = soup_jobs(files, lambda values: None)
    closed = os.open(files.folder / "outputs", os.O_RDONLY)
    refused = MergeJob(
        jobs[1].form, jobs[1].inputs, (closed, *jobs[1].target[1:]), 0, 9000, *NO_RUNS
    )
    streams = MergeStreams([jobs[0], refused], based=False, pairs=True)
    assert streams.run(0, files.buffer, BLOCK, np.zeros(4)) == 1
    assert streams.begin_of(1) == 0
    os.close(closed)


def span_of(files: Files, rows: list[np.ndarray], dtypes: list[str], start: int) -> StoredSpan:
    inputs = files.put(rows, dtypes)
    size = len(rows[0]) // width_of(dtypes[0])

    def load(begin: int, end: int) -> StoredBlock:
        parts = [
            raw[begin * width_of(dtype) : end * width_of(dtype)]
            for raw, dtype in zip(rows, dtypes, strict=True)
        ]
        return block_of(parts, dtypes, begin, based=True)

    return StoredSpan(
        start, size, True, inputs, files.buffer, BLOCK, load, lambda spent, is_whole: None
    )


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("start", [0, 2048])
def test_passes_over_spans(files: Files, start: int, streamed: bool) -> None:
    """Ties by hand; dot products, counts and samples by what they are defined as."""
    dtypes = ["BF16", "F16", "F32"]
    rows = stored_rows(np.random.default_rng(5), dtypes, 9000)
    values = decoded(rows, dtypes)
    deltas = [(v - values[0])[start:] for v in values[1:]]
    span = span_of(files, rows, dtypes, start)
    if not streamed:
        span = StoredSpan(**{**vars(span), "inputs": None})
    thresholds = {1: float(abs(deltas[1][700])), 0: 0.0}
    equal = {i: np.flatnonzero(np.abs(deltas[i]) == thresholds[i]) for i in thresholds}
    for rank in (0, -1):
        ordinals = {i: (len(where) if rank else 1) for i, where in equal.items()}
        found = passes.find_ties(span, thresholds, ordinals)
        assert found == {i: int(where[rank]) for i, where in equal.items()}
    products = passes.dot_products(span, 1024)
    for pair, (a, b) in enumerate([(0, 0), (0, 1), (1, 1)]):
        exact = math.fsum(deltas[a].astype(float) * deltas[b].astype(float))
        assert math.fsum(products[pair]) == pytest.approx(exact, rel=1e-12)
    if streamed and not start:
        sample = passes.sample_keys(span, 500, 2000)
        for row, delta in zip(sample, deltas, strict=True):
            runs = [keys(delta[begin : begin + 500].copy()) for begin in range(0, 9000, 2000)]
            np.testing.assert_array_equal(row, np.concatenate(runs))


def related(rows: list[np.ndarray], dtypes: list[str], share: float) -> Relations:
    """The sums of a tensor, one operation after another."""
    first, *others = decoded(rows, dtypes)
    deltas, sums = [values - first for values in others], Relations.empty(len(others))
    thresholds = [top_threshold(delta, share) for delta in deltas]
    add_relations([first, *deltas], thresholds, sums)
    sums.set_chance()
    return sums


def same_sums(a: Relations, b: Relations) -> None:
    for name, value in vars(a).items():
        np.testing.assert_array_equal(value, getattr(b, name), name)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data(), seed=st.integers(0, 2**32), sources=st.integers(1, 4))
def test_tensors_are_related_as_blocks_are(
    files: Files, data: Any, seed: int, sources: int
) -> None:
    """To the last bit: several tensors in one call, of any format."""
    rng, share = np.random.default_rng(seed), data.draw(st.sampled_from([0.01, 0.3, 1.0]))
    sizes = data.draw(st.lists(st.sampled_from(SIZES[:-1]), min_size=1, max_size=4))
    inputs, expected = [], []
    for size in sizes:
        dtypes = [data.draw(st.sampled_from(DTYPES)) for _ in range(sources + 1)]
        rows = stored_rows(rng, dtypes, size)
        inputs.append(files.put(rows, dtypes))
        expected.append(related(rows, dtypes, share))
    streams, spent = RelationStreams(inputs, [(0, size) for size in sizes], share), np.zeros(4)
    assert streams.run(0, files.buffer, 4096, spent) == len(sizes)
    for ours, plain in zip(streams.sums(), expected, strict=True):
        same_sums(ours, plain)
    assert spent[2] == sum(
        size * (4 if kind == FORMATS["F32"] else 2)
        for size, tensor in zip(sizes, inputs, strict=True)
        for _, _, kind in tensor
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("missing", [False, True])
def test_a_tensor_that_cannot_be_related_is_left_over(
    files: Files, dtype: str, missing: bool
) -> None:
    rng, dtypes = np.random.default_rng(0), [dtype] * 3
    tensors = [stored_rows(rng, dtypes, 1500) for _ in range(3)]
    inputs = [files.put(rows, dtypes) for rows in tensors]
    if missing:
        inputs[1][2] = (files.reading, os.fstat(files.reading).st_size - 1, FORMATS[dtype])
    else:
        raw = np.empty(width_of(dtype), np.uint8)
        encode_into(np.array([math.nan], np.float32), dtype, raw)
        os.pwrite(files.reading, raw.tobytes(), inputs[1][2][1] + 1499 * width_of(dtype))
    streams = RelationStreams(inputs, [(0, 1500)] * 3, 0.01)
    assert streams.run(0, files.buffer, BLOCK, np.zeros(4)) == 1
    assert streams.run(2, files.buffer, BLOCK, np.zeros(4)) == 3
    first, left_over, last = streams.sums()
    assert not left_over.both.any()
    assert not left_over.gram.any()
    same_sums(first, related(tensors[0], dtypes, 0.01))
    same_sums(last, related(tensors[2], dtypes, 0.01))


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data(), seed=st.integers(0, 2**32), sources=st.integers(1, 4))
def test_spans_are_related_as_blocks_are(files: Files, data: Any, seed: int, sources: int) -> None:
    """To the last bit, in as many blocks and pieces as it takes; thresholds are given."""
    rng, block = np.random.default_rng(seed), data.draw(st.sampled_from([BLOCK, 10 * BLOCK]))
    sizes = data.draw(st.lists(st.sampled_from([1, 2049, 9000, 40_000]), min_size=1, max_size=3))
    dtypes = [data.draw(st.sampled_from(DTYPES)) for _ in range(sources + 1)]
    thresholds = [data.draw(st.sampled_from([0.0, 1e-3, 0.5, 9e9])) for _ in range(sources)]
    inputs, spans, expected = [], [], []
    for size in sizes:
        rows = stored_rows(rng, dtypes, size)
        begin = data.draw(st.sampled_from([0, size // 2 // BLOCK * BLOCK]))
        first, *others = (values[begin:] for values in decoded(rows, dtypes))
        sums = Relations.empty(sources)
        add_relations([first, *(values - first for values in others)], thresholds, sums)
        sums.set_chance()
        inputs.append(files.put(rows, dtypes))
        spans.append((begin, size))
        expected.append(sums)
    buffer = np.zeros((sources + 1) * (4 * block + 64), np.uint8)
    streams = RelationStreams(inputs, spans, 0.01, thresholds)
    assert streams.run(0, buffer, block, np.zeros(4)) == len(sizes)
    for ours, plain in zip(streams.sums(), expected, strict=True):
        same_sums(ours, plain)


@pytest.mark.parametrize("dtypes", [["BF16"] * 3, ["F32", "F16", "BF16"]])
def test_columns_of_runs_are_what_was_stored(files: Files, dtypes: list[str]) -> None:
    rng, columns, length = np.random.default_rng(0), [0, 7, 39, 699], 700
    rows = stored_rows(rng, dtypes, 9000)
    base, *others = decoded(rows, dtypes)
    runs, inputs = Runs([0, 1400, 8300], length), files.put(rows, dtypes)
    spent = np.zeros(4)
    sample = read_sample(inputs, runs, columns, files.buffer, spent)
    for ours, values in zip(sample, others, strict=True):
        whole = values - base
        for row, first in zip(ours, runs.firsts, strict=True):
            np.testing.assert_array_equal(row, whole[first : first + length][columns])
    assert spent[2] == 3 * length * sum(map(width_of, dtypes))
    beyond = Runs([os.fstat(files.reading).st_size], length)
    assert read_sample(inputs, beyond, columns, files.buffer, spent) is None
