"""Matrices that are stored the other way round: any span of them, in the bits of the plain way."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_cli.formats.small_floats import numbers_of
from merge_cli.kernels import compiled
from merge_cli.kernels.turned import turned_eights, turned_fp4, turned_words

pytestmark = pytest.mark.skipif(bool(compiled.available()), reason=compiled.available())


@st.composite
def spans(draw: st.DrawFn) -> dict[str, int]:
    """A matrix, and a span of its numbers that begins in its first row and ends in its last."""
    rows, words = draw(st.integers(1, 40)), draw(st.integers(1, 150))
    return {
        "rows": rows,
        "words": words,
        "group": draw(st.integers(1, 40)),
        "before": draw(st.integers(0, 10**6)),
        "after": draw(st.integers(0, 10**6)),
        "seed": draw(st.integers(0, 2**32 - 1)),
    }


def random(span: dict[str, int]) -> np.random.Generator:
    return np.random.default_rng(span["seed"])


def room(span: dict[str, int], rows: int, width: int) -> tuple[int, np.ndarray]:
    """Where the span begins in its first row, and what is to be filled."""
    before, after = span["before"] % width, span["after"] % width
    size = max(1, rows * width - before - (after if rows > 1 else 0))
    return before, np.full(size, np.nan, np.float32)


def grid(span: dict[str, int], rows: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    groups = -(-width // span["group"])
    zeros = random(span).integers(0, 16, (rows, groups)).astype(np.float32)
    return zeros, random(span).normal(size=(rows, groups)).astype(np.float32)


@settings(max_examples=60, deadline=None)
@given(spans(), st.sampled_from([2, 4, 8]))
def test_words_of_codes_one_below_the_other(span: dict[str, int], bits: int) -> None:
    rows, width = span["rows"], span["words"] * 32 // bits
    wide = random(span).integers(0, 2**32, (span["words"], rows + 3)).astype(np.uint32)
    words = wide[:, 2 : rows + 2]  # as a strip is cut
    zeros, scales = grid(span, rows, width)
    begin, out = room(span, rows, width)
    turned_words(words, bits, zeros, scales, span["group"], begin, out)
    plain = np.empty_like(out)
    turned_words.reference(words, bits, zeros, scales, span["group"], begin, plain)
    np.testing.assert_array_equal(out, plain)
    for at in {0, len(out) // 2, len(out) - 1}:  # and what the docstring says
        row, column = divmod(begin + at, width)
        per_word = 32 // bits
        code = int(words[column // per_word, row]) >> (column % per_word * bits) & (2**bits - 1)
        group = column // span["group"]
        assert out[at] == (np.float32(code) - zeros[row, group]) * scales[row, group]


@settings(max_examples=60, deadline=None)
@given(spans(), st.permutations(range(0, 32, 4)), st.integers(0, 7))
def test_words_of_codes_side_by_side(span: dict[str, int], shifts: list[int], skip: int) -> None:
    rows, width = span["rows"], span["words"]
    eights = -(-(skip + rows) // 8)
    words = random(span).integers(0, 2**32, (width, eights + 2)).astype(np.uint32)[:, 1:-1]
    zeros, scales = grid(span, rows, width)
    begin, out = room(span, rows, width)
    turned_eights(words, shifts, zeros, scales, span["group"], skip, begin, out)
    plain = np.empty_like(out)
    turned_eights.reference(words, shifts, zeros, scales, span["group"], skip, begin, plain)
    np.testing.assert_array_equal(out, plain)
    for at in {0, len(out) // 2, len(out) - 1}:
        row, column = divmod(begin + at, width)
        word, number = divmod(row + skip, 8)
        code = int(words[column, word]) >> shifts[number] & 15
        group = column // span["group"]
        assert out[at] == (np.float32(code) - zeros[row, group]) * scales[row, group]


@settings(max_examples=60, deadline=None)
@given(spans(), st.integers(0, 70))
def test_small_floats_in_bytes(span: dict[str, int], first: int) -> None:
    rows, width, group = span["rows"], span["words"], 32
    size = -(-(first + rows) // 2) - first // 2
    raw = random(span).integers(0, 256, (width, size + 2), dtype=np.uint8)[:, 1:-1]
    groups = -(-(first + rows) // group) - first // group
    exponents = random(span).integers(0, 256, (width, groups), dtype=np.uint8)
    powers = numbers_of("F8_E8M0")[exponents.T]
    begin, out = room(span, rows, width)
    with np.errstate(all="ignore"):
        turned_fp4(raw, exponents, group, first, rows, begin, out)
        plain = np.empty_like(out)
        turned_fp4.reference(raw, exponents, group, first, rows, begin, plain)
    assert out.tobytes() == plain.tobytes()  # with the sign of zeros
    for at in {0, len(out) // 2, len(out) - 1}:
        row, column = divmod(begin + at, width)
        byte, number = divmod(first % 2 + row, 2)
        code = int(raw[column, byte]) >> 4 * number & 15
        power = powers[(first + row) // group - first // group, column]
        with np.errstate(all="ignore"):
            np.testing.assert_equal(out[at], numbers_of("F4_E2M1")[code] * power)
