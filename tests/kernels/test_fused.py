"""Fused loops against the plain way, bit for bit: decode, the method's own function, encode."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_cli.checkpoint.dtypes import width_of
from merge_cli.engine.merge_stats import SampleRuns, StatisticsMeter
from merge_cli.kernels import fused, passes, reduce
from merge_cli.kernels.convert import encode_into
from merge_cli.kernels.cut import MagnitudeThreshold
from merge_cli.methods.blocks import Block, Span
from merge_cli.methods.method import Method
from merge_cli.methods.registry import get_method
from merge_cli.methods.sparsification import RandomDrop
from merge_cli.methods.ties import TiesTrim
from tests.support.stored import DTYPES, block_of, decoded, stored_rows

SIZES = (1, 2, 63, 2047, 2048, 2049, 5000)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """As inside a worker: numbers that overflow are no warning."""
    with np.errstate(all="ignore"):
        yield


def settings_of(
    draw: Any, name: str, sources: int, magnitudes: np.ndarray
) -> tuple[dict[str, Any], Any]:
    """Parameters as the engine hands them out, and what `tensor_pass` might have found."""
    weights = st.sampled_from([1.0, 0.7, 0.0, -0.3, 1e-9, 3.0])
    weight = [draw(weights) for _ in range(sources)]
    flag = st.booleans()
    factors = draw(st.sampled_from([None, [1.0, 2.0, 0.5, 1.25][:sources]]))
    density = [draw(st.sampled_from([0.5, 0.1, 1.0, 0.0])) for _ in range(sources)]
    linear = {"weight": weight, "normalize": draw(flag)}
    based = {**linear, "lambda_": draw(st.sampled_from([1.0, 0.4, 0.0, -1.0]))}
    if name == "soup":
        divisor = draw(st.sampled_from([None, 3.0]))
        if divisor is None and abs(math.fsum(weight)) < 1e-8:
            linear["normalize"] = False  # refused in the plan
        return {**linear, "divisor": divisor}, None
    if name == "slerp":
        return {"t": 0.4}, weight
    if name == "task_arithmetic":
        return based, None
    if name in ("dare", "dare_ties"):
        elect = {"elect": draw(st.sampled_from(["weighted", "unweighted"]))}
        options = {"density": density, "rescale": "density", **(elect if name != "dare" else {})}
        return {**based, **options}, RandomDrop(density, factors)
    last_tie = st.sampled_from([-1, 0, 700, 2**63 - 1])
    thresholds = st.sampled_from([*magnitudes.tolist(), 0.0, math.inf, math.nan])
    cuts = [
        draw(st.one_of(st.none(), st.builds(MagnitudeThreshold, thresholds, last_tie)))
        for _ in range(sources)
    ]
    parameters = {
        "density": density,
        "rescale": False,
        "semantics": draw(st.sampled_from(["mergekit", "paper"])),
        "trim": None,
        "elect": draw(st.sampled_from([None, "weighted", "unweighted"])),
        "divisor": draw(st.sampled_from([None, "weights", "count"])),
        "zero_sign": None,
    }
    return {**based, **parameters}, TiesTrim(cuts, factors, draw(st.sampled_from([1.0, -1.0, 0.0])))


def plainly(
    method: Method, values: list[np.ndarray], at: Span, prepared: Any, parameters: dict[str, Any]
) -> tuple[np.ndarray | None, list[np.ndarray], np.ndarray]:
    """Base, operands and result of the method's own function."""
    base = values[0].copy() if method.needs_base else None
    operands = [v - base for v in values[1:]] if base is not None else [v.copy() for v in values]
    matrix = np.stack(operands)
    offered = {
        "base": base,
        "models": list(matrix),
        "deltas": list(matrix),
        "at": at,
        "prepared": prepared,
    }
    supplied = {name: value for name, value in offered.items() if name in method.supplied}
    merged = method.function(**supplied, **parameters)
    return base, operands, merged


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(),
    name=st.sampled_from(["soup", "slerp", "task_arithmetic", "dare", "dare_ties", "ties"]),
    seed=st.integers(0, 2**32),
    size=st.sampled_from(SIZES),
    start=st.sampled_from([0, 65_536, 2**32 - 8192]),
    out_dtype=st.sampled_from(DTYPES),
)
def test_the_bits_of_the_plain_way(
    data: Any, name: str, seed: int, size: int, start: int, out_dtype: str
) -> None:
    method = get_method(name)
    assert method.fused is not None
    sources = 2 if name == "slerp" else data.draw(st.integers(1, 4))
    dtypes = [data.draw(st.sampled_from(DTYPES)) for _ in range(sources + method.needs_base)]
    rows = stored_rows(np.random.default_rng(seed), dtypes, size)
    values = decoded(rows, dtypes)
    deltas = np.abs(values[-1] - values[0])[:3]
    parameters, prepared = settings_of(data.draw, name, sources, deltas)
    at = Span("layers.3.weight", start, seed=9, sources=(0, 2, 5, 1)[:sources])
    _, _, merged = plainly(method, values, at, prepared, parameters)
    expected = np.empty(size * width_of(out_dtype), np.uint8)
    fits = encode_into(merged, out_dtype, expected)

    form = method.fused(at, prepared, **parameters)
    out = np.empty_like(expected)
    whole = fused.merge(
        form, block_of(rows, dtypes, start, based=method.needs_base), out_dtype, out
    )
    assert whole == fits
    if fits:
        np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["soup", "task_arithmetic", "dare_ties"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where", [0, 2047, 2048, 4999])
def test_what_is_not_finite_is_left_to_the_plain_way(
    name: str, dtype: str, where: int, value: float
) -> None:
    method = get_method(name)
    assert method.fused is not None
    rows = stored_rows(np.random.default_rng(0), [dtype] * 3, 5000)
    out = np.empty(10_000, np.uint8)
    parameters = {
        "weight": [1.0] * (3 - method.needs_base),
        "normalize": True,
        **({"divisor": None} if name == "soup" else {"lambda_": 1.0}),
        **({"elect": "weighted"} if name == "dare_ties" else {}),
    }
    form = method.fused(Span("x", 0, 0, (0, 1)), RandomDrop([0.5, 1.0]), **parameters)
    for index in range(3):
        changed = [raw.copy() for raw in rows]
        width = width_of(dtype)
        encode_into(np.array([value], np.float32), dtype, changed[index][where * width :][:width])
        assert fused.merge(form, block_of(rows, [dtype] * 3, 0, based=name != "soup"), "BF16", out)
        block = block_of(changed, [dtype] * 3, 0, based=name != "soup")
        assert not fused.merge(form, block, "BF16", out)


def test_float16_that_overflows_is_left_to_the_plain_way() -> None:
    rows = [np.full(3000, 60_000.0, np.float32).view(np.uint8)] * 2
    block = block_of(rows, ["F32", "F32"], 0, based=False)
    out = np.empty(6000, np.uint8)
    assert not fused.merge(fused.FusedForm([1.0, 1.0]), block, "F16", out)
    assert fused.merge(fused.FusedForm([1.0, 1.0], 2.0), block, "F16", out)
    assert (out.view(np.float16) == np.float16(60_000)).all()


def test_a_block_of_two_keys_is_left_to_the_plain_way() -> None:
    rows = stored_rows(np.random.default_rng(0), ["BF16"] * 2, 100)
    form = fused.FusedForm([1.0], drop=fused.Masks(0, [0], "x", [0.5]))
    out = np.empty(200, np.uint8)
    assert not fused.merge(form, block_of(rows, ["BF16"] * 2, 2**32 - 50, based=True), "BF16", out)
    assert fused.merge(form, block_of(rows, ["BF16"] * 2, 2**32 - 100, based=True), "BF16", out)


@pytest.mark.parametrize("name", ["soup", "slerp", "task_arithmetic", "dare", "dare_ties", "ties"])
def test_statistics_are_those_of_the_plain_way(name: str) -> None:
    method = get_method(name)
    assert method.fused is not None
    size, start, sources = 40_000, 262_144, 2
    dtypes = ["BF16", "F16", "F32"][: sources + method.needs_base]
    rows = stored_rows(np.random.default_rng(3), dtypes, size)
    at = Span("w", start, 0, (0, 1))
    cuts = [MagnitudeThreshold(0.01, start + 9), None]
    prepared: Any = {
        "slerp": [0.4, 0.7],
        "dare": RandomDrop([0.5, 1.0], [2.0, 1.0]),
        "dare_ties": RandomDrop([0.5, 0.1], [2.0, 10.0]),
        "ties": TiesTrim(cuts),
    }.get(name)
    parameters = {
        key: [parameter.default] * sources if parameter.per_model else parameter.default
        for key, parameter in method.parameters.items()
    }
    arguments = {method.parameters[key].argument: value for key, value in parameters.items()}
    base, operands, merged = plainly(method, decoded(rows, dtypes), at, prepared, arguments)

    def kept(block: Block) -> list[int]:
        assert method.count_kept is not None
        return method.count_kept(block, prepared, parameters)

    count_kept = kept if method.count_kept else None
    plain, stored = (StatisticsMeter(sources, 10**6, count_kept) for _ in range(2))
    plain.add(Block(base, list(np.stack(operands)), at), merged)
    form = method.fused(at, prepared, **arguments)
    stored.add_stored(form, block_of(rows, dtypes, start, based=method.needs_base))
    a, b = plain.result(), stored.result()
    assert 0 < a.sampled < a.count == size
    for field in ("count", "sampled", "both", "agree", "conflict", "kept"):
        assert getattr(a, field) == getattr(b, field), field
    for field in ("gram", "base", "change"):
        np.testing.assert_allclose(getattr(a, field), getattr(b, field), rtol=1e-5)


@pytest.mark.parametrize("based", [True, False])
@pytest.mark.parametrize("size", [1, 63, 2048, 5000, 9001])
def test_dot_products_are_those_of_the_plain_way(size: int, based: bool) -> None:
    dtypes = ["BF16", "F16", "F32"]
    rows = stored_rows(np.random.default_rng(size), dtypes, size)
    values = decoded(rows, dtypes)
    operands = [v - values[0] for v in values[1:]] if based else values
    products = passes.dot_products([block_of(rows, dtypes, 0, based=based)], 4096)
    pairs = [(i, j) for i in range(len(operands)) for j in range(i, len(operands))]
    for (i, j), found in zip(pairs, products, strict=True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reduce, "BLOCK_MULTIPLE", 4096)
            expected = reduce.dot_runs(operands[i].copy(), operands[j].copy())
        assert found == expected


@pytest.mark.parametrize("size", [1, 4096, 16_384, 90_000, 524_289, 3_000_000, 20_000_000])
def test_the_sample_does_not_depend_on_cuts(size: int) -> None:
    runs = SampleRuns.of(size)
    whole = list(runs.within(0, size))
    sampled = sum(stop - start for start, stop in whole)
    assert sampled == size if size < 16_384 else size / 80 <= sampled < size
    assert sampled >= min(size, 8192)
    for step in (65_536, 3 * 65_536):
        cut = [
            run
            for start in range(0, size, step)
            for run in runs.within(start, min(start + step, size))
        ]
        assert cut == whole
