"""Compiled loops against their plain twins, bit for bit; and merging where they are missing."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import merge_cli
from merge_cli.engine import device
from merge_cli.kernels import compiled, cut, elect, mask, measures, reduce
from merge_cli.kernels.backend import matrix
from merge_cli.kernels.convert import decode, decode_rows, encode, encode_into
from merge_cli.kernels.cut import MagnitudeThreshold
from tests.support.tiny import Family, merge

AWKWARD = [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 1.1754944e-38, 3.4028235e38, -3.4028235e38]
NOT_FINITE = [math.inf, -math.inf, math.nan]
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@pytest.fixture(autouse=True)
def quiet() -> Any:
    """As inside a lane: numbers that overflow are no warning."""
    with np.errstate(all="ignore"):
        yield


def values(size: int, seed: int, *, finite: bool = True) -> np.ndarray:
    """Numbers of every magnitude, zeros of both signs, subnormals, repeated values."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(size) * 2.0 ** rng.integers(-30, 10, size)
    x[rng.random(size) < 0.2] = 0.0
    x = np.where(rng.random(size) < 0.3, np.round(x, 2), x).astype(np.float32)
    special = AWKWARD if finite else AWKWARD + NOT_FINITE
    where = rng.integers(0, size, min(size, 20))
    x[where] = rng.choice(np.array(special, np.float32), len(where))
    return x


def same(a: Any, b: Any) -> None:
    """Equal bits."""
    a, b = (np.ascontiguousarray(x.numpy() if isinstance(x, torch.Tensor) else x) for x in (a, b))
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))


def rows(sources: int, size: int, seed: int = 0, **options: bool) -> list[np.ndarray]:
    return [values(size, seed * 100 + i, **options) for i in range(sources)]


def tensors(arrays: list[np.ndarray]) -> list[torch.Tensor]:
    return [torch.from_numpy(array.copy()) for array in arrays]


SIZES = [1, 63, 2048, 70_001]


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_16_bit_pattern_is_decoded(dtype: str) -> None:
    raw = np.arange(65_536, dtype=np.uint16).view(np.uint8)
    expected = decode(torch.from_numpy(raw.copy()), dtype, wide=False).numpy()
    out = np.empty((1, 65_536), np.float32)
    assert not decode_rows(raw[None], dtype, out, None, deltas=False)
    number = ~np.isnan(expected)
    same(out[0][number], expected[number])
    assert np.isnan(out[0][~number]).all()
    finite = np.isfinite(expected)
    some = raw.view(np.uint16)[finite].view(np.uint8)
    assert decode_rows(some[None], dtype, np.empty((1, finite.sum()), np.float32), None,
                       deltas=False)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_deltas_are_subtracted_once(dtype: str, size: int) -> None:
    models = [model.to(DTYPES[dtype]) for model in tensors(rows(3, size))]
    raw = np.stack([model.view(torch.uint8).numpy() for model in models])
    base, out = np.empty(size, np.float32), np.empty((2, size), np.float32)
    finite = decode_rows(raw, dtype, out, base, deltas=True)
    assert finite == all(bool(model.isfinite().all()) for model in models)
    expected = [model.float() - models[0].float() for model in models[1:]]
    same(base, models[0].float())
    number = ~torch.stack(expected).isnan().numpy()
    same(out[number], torch.stack(expected).numpy()[number])


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["BF16", "F16", "F32"]))
def test_rounding(bits: int, dtype: str) -> None:
    """Any float32, and its neighbours and the halfway points around it."""
    around = np.array([bits + d for d in (-0x8000, -0x1000, -1, 0, 1, 0x1000, 0x8000)], np.int64)
    x = (around % 2**32).astype(np.uint32).view(np.float32)
    expected, fits = encode(torch.from_numpy(x.copy()), dtype)
    out = np.empty(len(x) * (4 if dtype == "F32" else 2), np.uint8)
    assert encode_into(x, dtype, out) == fits
    number = ~np.isnan(x) if dtype == "F32" else slice(None)
    stored = np.uint32 if dtype == "F32" else np.uint16
    wanted: Any = expected.view(torch.uint8).numpy().view(stored)
    actual: Any = out.view(stored)
    same(actual[number] & 0x7FFF if dtype != "F32" else actual[number],
         wanted[number] & 0x7FFF if dtype != "F32" else wanted[number])  # fmt: skip
    signs = ~np.isnan(x)
    same(out.view(stored)[signs], wanted[signs])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("sources", [1, 2, 5])
def test_sums(size: int, sources: int) -> None:
    a, weights = rows(sources, size), [0.3, -1.7, 0.1, 2.0, 1e-3][:sources]
    same(reduce.weighted_sum(weights, a), reduce.weighted_sum(weights, tensors(a)))
    base, change = values(size, 8), values(size, 9)
    (base_, change_) = tensors([base, change])
    expected = reduce.add_scaled(base_, 0.7, change_.clone())
    same(reduce.add_scaled(base, 0.7, change.copy()), expected)
    same(reduce.divided(change.copy(), 0.3), reduce.divided(change_.clone(), 0.3))
    assert reduce.dot_runs(base, change) == reduce.dot_runs(*tensors([base, change]))
    assert reduce.absolute_runs(base) == reduce.absolute_runs(*tensors([base]))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("divide_by", ["weights", "count", "nothing"])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("zero_sign", [1.0, -1.0, 0.0])
def test_election(size: int, divide_by: str, weighted: bool, zero_sign: float) -> None:
    a = rows(3, size)
    a[1][::3] = -a[0][::3]  # votes that cancel
    for weights in ([1.0, 1.0, 1.0], [0.3, -0.3, 0.9]):
        options: dict[str, Any] = {
            "weighted_election": weighted,
            "divide_by": divide_by,
            "zero_sign": zero_sign,
        }
        expected = elect.disjoint_mean(tensors(a), weights, **options)
        same(elect.disjoint_mean(a, weights, **options), expected)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("start", [0, 2**32 - 40])
def test_masks(size: int, start: int) -> None:
    a, density = rows(2, size), [0.3, 1.0]
    given = (7, [0, 4], "w", start, density)
    for factors in (None, [1 / 0.3, 0.9]):
        for ours, plain in zip(
            mask.drop(a, *given, factors), mask.drop(tensors(a), *given, factors), strict=True
        ):
            np.testing.assert_array_equal(ours, plain.numpy())  # a dropped -0.0 may be 0.0
    assert mask.count_kept(a, *given) == mask.count_kept(tensors(a), *given)


@pytest.mark.parametrize("size", SIZES)
def test_trimming(size: int) -> None:
    a = rows(3, size, finite=False)
    cuts = [MagnitudeThreshold(0.01, size // 2), None, MagnitudeThreshold(math.inf, -1)]
    for ours, plain in zip(cut.trimmed(a, cuts, 0), cut.trimmed(tensors(a), cuts, 0), strict=True):
        np.testing.assert_array_equal(ours, plain.numpy())
    for row, one in zip(a, cuts, strict=True):
        assert cut.count_kept(row, one, 0) == cut.count_kept(torch.from_numpy(row), one, 0)


@pytest.mark.parametrize("size", SIZES)
def test_measures(size: int) -> None:
    a = [row * 0.01 for row in rows(3, size)]
    a = [np.clip(row, -100, 100) for row in a]
    found = []
    for form in (a, tensors(a)):
        gram, both, agree = np.zeros((3, 3)), *np.zeros((2, 3, 3), np.int64)
        measures.add_gram(form, gram, pairs=True)
        conflict = measures.add_signs(form, both, agree)
        found.append((gram, both, agree, conflict, measures.squares(form[0], form[1])))
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-4, atol=1e-5 * size)
    np.testing.assert_array_equal(found[0][1], found[1][1])
    np.testing.assert_array_equal(found[0][2], found[1][2])
    assert found[0][3] == found[1][3]
    assert found[0][4] == pytest.approx(found[1][4], rel=1e-4)


def test_a_kernel_without_a_place_for_its_cache_is_compiled_anyway(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def nowhere(*_: Any) -> None:
        raise RuntimeError("cannot cache function 'f': no locator available for file 'f.py'")

    monkeypatch.setattr("numba.core.caching.FunctionCache.__init__", nowhere)
    kernel = compiled.Kernel(lambda x: x[0] + 1, "f8(f8[::1])")
    assert kernel(np.array([2.0])) == 3.0


def test_an_argument_of_another_type_is_refused_by_what_was_loaded() -> None:
    """As by what was compiled here: nothing takes one layout for another."""
    counts, found = np.ones((8, 2), np.int64), np.empty(8, np.int64)
    indexes = np.empty(8, np.int32)
    compiled.not_empty.load()  # kept, from now on
    loaded = compiled.Kernel(
        compiled.not_empty._function, compiled.not_empty._signature, compiled.not_empty._fastmath
    )
    assert loaded._kept() is not None
    with pytest.raises(TypeError, match="No matching definition"):
        loaded(counts[:, 0], indexes, found)
    assert loaded(counts[:, 0].copy(), indexes, found) == 8


@pytest.mark.parametrize("method", ["ties", "dare_ties"])
def test_without_numba(
    family: Family, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = family.recipe(method, parameters={"density": 0.53})
    expected = merge(recipe, tmp_path / "with")
    monkeypatch.setattr(compiled, "available", lambda: "numba cannot be imported (a test)")
    plain = merge(recipe, tmp_path / "without")
    for name, tensor in expected.items():
        assert torch.equal(plain[name], tensor)
    report = json.loads((tmp_path / "without" / "merge_report.json").read_text())
    assert report["device"]["arithmetic"] == "torch: numba cannot be imported (a test)"


def test_who_computes(family: Family) -> None:
    assert device.choose_arithmetic(merge_cli.plan(family.recipe("ties")))[0] == "compiled"
    wide = family.recipe("ties", dtype="float64")
    assert device.choose_arithmetic(merge_cli.plan(wide)) == ("torch", "F64 among the tensors")


@pytest.mark.parametrize("count", [1, 3])
def test_rows_of_a_matrix_are_not_copied(count: int) -> None:
    """Bits that are read as numbers are not the matrix of bits that they lie in."""
    block = np.full((count, 4), 1.5, np.float32)
    assert matrix([*block]) is block
    bits = block.view(np.uint32).copy()
    read = matrix([row.view(np.float32) for row in bits])
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, block)
