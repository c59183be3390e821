"""Windows and copies inside of compiled loops, against numpy's slices."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from merge_cli.kernels.compiled import arrays
from merge_cli.kernels.compiled.kernel import F32, Kernel

# Only numba calls them.
window: Any = arrays.window
copy_16: Any = arrays.copy_16
new_f32_rows: Any = arrays.new_f32_rows

ROWS = np.arange(60, dtype=np.float32).reshape(3, 20)


def last_of_window(rows: Any, first: int, count: int) -> Any:
    part = window(rows, first, count)
    part[0] = -part[0]
    return part[len(part) - 1]


def sum_of_copy(row: Any, first: int) -> Any:
    part, total = copy_16(row, first), F32(0.0)
    row[first] = F32(1000.0)  # which the copy does not see
    for i in range(16):
        total += part[i]
    return total


def window_of_the_dead(size: int) -> Any:
    rows = new_f32_rows(2, size)
    for i in range(size):
        rows[1, i] = i
    part = window(rows, size, size)  # nothing names `rows` from here on
    other = new_f32_rows(2, size)
    total = F32(0.0)
    for i in range(size):
        other[0, i], other[1, i] = -1.0, -1.0
        total += part[i]
    return total


@pytest.mark.parametrize(("first", "count"), [(0, 60), (0, 1), (19, 3), (59, 1)])
def test_a_window_counts_through_all_dimensions_and_is_no_copy(first: int, count: int) -> None:
    rows = ROWS.copy()
    kernel = Kernel(last_of_window, "f4(f4[:, ::1], i8, i8)")
    expected = ROWS.reshape(-1)[first : first + count].copy()
    expected[0] = -expected[0]
    assert kernel(rows, first, count) == expected[-1]
    assert (rows.reshape(-1)[first : first + count] == expected).all()


def test_a_copy_keeps_what_was_there() -> None:
    row = ROWS.reshape(-1).copy()
    assert Kernel(sum_of_copy, "f4(f4[::1], i8)")(row, 7) == ROWS.reshape(-1)[7:23].sum()
    assert row[7] == 1000


def test_a_window_keeps_its_array_alive() -> None:
    assert Kernel(window_of_the_dead, "f4(i8)")(1000) == sum(range(1000))


def test_vectors_of_what_stands_side_by_side_are_for_those_kernels_alone() -> None:
    from numba.core import config

    before = config.SLP_VECTORIZE
    kernel = Kernel(sum_of_copy, "f4(f4[::1], i8)", False, True)
    assert kernel(ROWS.reshape(-1).copy(), 0) == ROWS.reshape(-1)[:16].sum()
    assert before == config.SLP_VECTORIZE
