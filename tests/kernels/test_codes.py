"""Codes of few bits: compiled loops give the bits of the plain ones, whatever the shapes."""

from __future__ import annotations

import numpy as np
import pytest

from merge_cli.kernels import compiled
from merge_cli.kernels.codes import look_up, scale_groups, spread

pytestmark = pytest.mark.skipif(bool(compiled.available()), reason=compiled.available())
RANDOM = np.random.default_rng(0)


def noise(*shape: int) -> np.ndarray:
    return RANDOM.integers(0, 256, shape).astype(np.uint8)


def floats(*shape: int) -> np.ndarray:
    return RANDOM.normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("run", [1, 4, 16, 33])
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_codes_of_a_byte(bits: int, run: int, rows: int) -> None:
    raw = noise(rows, run * 3)
    codes = spread(raw, bits, run)
    assert codes.dtype == np.uint8
    np.testing.assert_array_equal(codes, spread.reference(raw, bits, run))
    for row, line in zip(raw, codes, strict=True):  # and what the docstring says
        for part in range(3):
            stored = row[part * run : (part + 1) * run]
            begin = part * run * 8 // bits
            expected = [(int(b) >> k) & (2**bits - 1) for k in range(0, 8, bits) for b in stored]
            assert line[begin : begin + len(expected)].tolist() == expected


def test_codes_of_bytes_that_lie_apart() -> None:
    raw = noise(7, 64)[:, ::2].T
    np.testing.assert_array_equal(spread(raw, 4), spread.reference(raw, 4))
    np.testing.assert_array_equal(spread(raw[None], 2)[0], spread.reference(raw, 2))


@pytest.mark.parametrize("shape", [(0,), (7,), (3, 5), (2, 3, 4)])
def test_entries_of_a_table(shape: tuple[int, ...]) -> None:
    codes, table = noise(*shape), floats(256)
    np.testing.assert_array_equal(look_up(table, codes), table[codes])
    pairs = floats(256, 2).view(np.uint64).reshape(-1)
    np.testing.assert_array_equal(look_up(pairs, codes.T), pairs[codes.T])


@pytest.mark.parametrize(("rows", "groups", "width"), [(1, 1, 1), (3, 4, 16), (2, 5, 7)])
def test_groups_are_scaled(rows: int, groups: int, width: int) -> None:
    for scales in (floats(rows, groups), floats(1, groups), floats(groups, rows).T):
        numbers = floats(rows, groups * width)
        expected = numbers.copy()
        scale_groups.reference(expected, scales)
        scale_groups(numbers, scales)
        np.testing.assert_array_equal(numbers, expected)
    strided = floats(rows, 2 * groups * width)[:, ::2]
    before = strided.copy()
    scale_groups(strided, np.full((1, groups), 2, np.float32))
    np.testing.assert_array_equal(strided, 2 * before)
