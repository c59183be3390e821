"""Loops over codes: compiled and plain are the same, and both are what torch and tables say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from merge_cli.kernels import compiled, quantise
from merge_cli.kernels.backend import Primitive

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
# The first call compiles, and the first draw reads sources for constants.
slow_first_call = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
any_float = st.floats(width=32, allow_nan=True, allow_infinity=True)
groups = arrays(
    np.float32, st.tuples(st.integers(1, 5), st.sampled_from([2, 16, 34])), elements=any_float
)


def both(primitive: Primitive[Any, Any], *arguments: Any, outs: list[np.ndarray]) -> Any:
    """What both implementations fill in, which must be the same bits."""
    compiled_outs = [np.zeros_like(out) for out in outs]
    with np.errstate(all="ignore"):
        primitive.reference(*arguments, *outs)
        if not compiled.available():
            getattr(compiled, primitive.reference.__name__)(*arguments, *compiled_outs)
            for plain, loop in zip(outs, compiled_outs, strict=True):
                np.testing.assert_array_equal(plain.view(np.uint8), loop.view(np.uint8))
    return outs


def halves(codes: np.ndarray) -> np.ndarray:
    return np.stack([codes & 15, codes >> 4], -1).reshape(len(codes), -1)


@slow_first_call
@given(groups)
def test_extremes(values: np.ndarray) -> None:
    above, below = both(quantise.group_extremes, values, outs=[*np.empty((2, len(values)), "f4")])
    for g, group in enumerate(values):
        if np.isfinite(group).all():
            assert above[g] == max(0, group.max())
            assert below[g] == max(0, (-group).max())
        else:
            assert not (np.isfinite(above[g]) and np.isfinite(below[g]))


@slow_first_call
@given(groups, st.floats(2**-20, 2**20, width=32))
def test_e2m1_is_the_nearest(values: np.ndarray, scale: float) -> None:
    scales = np.full(len(values), scale, np.float32)
    empty = np.empty((len(values), values.shape[1] // 2), np.uint8)
    (codes,) = both(quantise.encode_e2m1, values, scales, outs=[empty])
    single = halves(codes)
    np.testing.assert_array_equal(single >> 3, np.signbit(values))
    known = np.isfinite(values)
    with np.errstate(all="ignore"):
        quotient = np.minimum(np.abs(values / scales[:, None]), 100)[known].astype(np.float64)
    number = E2M1[single[known] & 7]
    error, least = abs(number - quotient), abs(E2M1 - quotient[:, None]).min(1)
    np.testing.assert_array_equal(error, least)
    ties = (abs(E2M1 - quotient[:, None]) == least[:, None]).sum(1) > 1
    assert not (single[known][ties] & 1).any()  # of two, the even code


@slow_first_call
@given(groups, st.floats(2**-20, 2**20, width=32), st.integers(-8, 7))
def test_int4_is_the_nearest(values: np.ndarray, scale: float, zero: int) -> None:
    scales = np.full(len(values), scale, np.float32)
    zeros = np.full(len(values), zero, np.float32)
    empty = np.empty((len(values), values.shape[1] // 2), np.uint8)
    (codes,) = both(quantise.encode_int4, values, scales, zeros, outs=[empty])
    known = ~np.isnan(values)
    with np.errstate(all="ignore"):
        quotient = values / scales[:, None] + zeros[:, None]
    wanted = np.rint(np.clip(quotient[known], -8, 7)) + 8
    np.testing.assert_array_equal(halves(codes)[known], wanted)


@slow_first_call
@given(groups, st.integers(1, 3), st.sampled_from([1, 5, 40]))
def test_e4m3_of_blocks_is_torchs(values: np.ndarray, tall: int, wide: int) -> None:
    grid = (-(-len(values) // tall), -(-values.shape[1] // wide))
    (largest,) = both(quantise.block_largest, values, tall, wide, outs=[np.empty(grid, "f4")])
    finite = np.where(np.isfinite(values), np.abs(values), 0)
    assert largest.max() == finite.max()
    assert quantise.largest_magnitude(values.reshape(-1)) == finite.max()
    scales = np.maximum(largest / np.float32(448), np.float32(2**-126))
    empty = np.empty(values.shape, np.uint8)
    (codes,) = both(quantise.encode_e4m3, values, tall, wide, scales, outs=[empty])
    each = scales.repeat(tall, 0)[: len(values)].repeat(wide, 1)[:, : values.shape[1]]
    with np.errstate(all="ignore"):
        clipped = np.clip(values / each, -448, 448)
    theirs = torch.from_numpy(clipped).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    known = np.isfinite(values)
    np.testing.assert_array_equal(codes[known], theirs[known])
    assert (codes[~known] == 0x7F).all()


@slow_first_call
@given(groups, st.integers(1, 3), st.sampled_from([1, 5, 40]))
def test_e5m2_of_blocks_is_torchs(values: np.ndarray, tall: int, wide: int) -> None:
    grid = (-(-len(values) // tall), -(-values.shape[1] // wide))
    (largest,) = both(quantise.block_largest, values, tall, wide, outs=[np.empty(grid, "f4")])
    scales = np.maximum(largest / np.float32(57344), np.float32(2**-126))
    empty = np.empty(values.shape, np.uint8)
    (codes,) = both(quantise.encode_e5m2, values, tall, wide, scales, outs=[empty])
    each = scales.repeat(tall, 0)[: len(values)].repeat(wide, 1)[:, : values.shape[1]]
    with np.errstate(all="ignore"):
        quotient = values / each
    finite = np.isfinite(values)
    clipped = np.where(finite, np.clip(quotient, -57344, 57344), quotient)
    theirs = torch.from_numpy(clipped).to(torch.float8_e5m2).view(torch.uint8).numpy()
    known = ~np.isnan(values)
    np.testing.assert_array_equal(codes[known], theirs[known])
    assert (codes[~known] == 0x7F).all()


@slow_first_call
@given(groups, st.floats(-(2.0**10), 2.0**10, width=32), st.sampled_from([3, 7, 255]))
def test_affine_codes_are_the_nearest(values: np.ndarray, bias: float, largest: int) -> None:
    scales = np.where(np.arange(len(values)) % 2, 0.75, -3).astype(np.float32)
    biases = np.full(len(values), bias, np.float32)
    arguments = values, scales, biases, float(largest)
    (codes,) = both(quantise.encode_affine, *arguments, outs=[np.empty(values.shape, np.uint8)])
    with np.errstate(all="ignore"):
        quotient = (values - biases[:, None]) / scales[:, None]
    known = ~np.isnan(quotient)
    np.testing.assert_array_equal(codes[known], np.rint(np.clip(quotient[known], 0, largest)))


@pytest.mark.parametrize("size", [16, 2048, 5000])
def test_groups_of_any_size(size: int) -> None:
    """Many small groups, and one that is longer than a batch."""
    values = np.random.default_rng(size).normal(size=(300 if size < 100 else 3, size))
    values = values.astype(np.float32)
    scales = np.abs(values).max(1) / np.float32(6)
    empty = np.empty((len(values), size // 2), np.uint8)
    both(quantise.encode_e2m1, values, scales, outs=[empty])
    both(quantise.encode_int4, values, scales, np.zeros_like(scales), outs=[empty])
    both(quantise.encode_e4m3, values, 1, size, scales[:, None], outs=[np.empty_like(values, "u1")])
