"""Inputs as they are stored: bytes in the three formats that compiled loops read."""

from __future__ import annotations

import numpy as np

from merge_cli.checkpoint.dtypes import width_of
from merge_cli.kernels import fused
from merge_cli.kernels.convert import decode_row, encode_into

DTYPES = ("BF16", "F16", "F32")
AWKWARD = [0.0, -0.0, 1.0, -1.0, 6e-8, -6e-8, 1e-45, -1e-45, 1.1754944e-38, 60_000.0, -65_504.0]


def stored_rows(rng: np.random.Generator, dtypes: list[str], size: int) -> list[np.ndarray]:
    """Bytes of related inputs: numbers of every magnitude, zeros, repeated and equal ones."""
    shared = rng.standard_normal(size) * 2.0 ** rng.integers(-24, 4, size)
    rows = []
    for dtype in dtypes:
        change = np.round(rng.standard_normal(size), 1) * 2.0 ** rng.integers(-12, 0, size)
        values = np.where(rng.random(size) < 0.4, shared, shared + change).astype(np.float32)
        where = rng.integers(0, size, min(size, 20))
        values[where] = rng.choice(np.array(AWKWARD, np.float32), len(where))
        raw = np.empty(size * width_of(dtype), np.uint8)
        encode_into(values, dtype, raw)
        rows.append(raw)
    return rows


def decoded(rows: list[np.ndarray], dtypes: list[str]) -> list[np.ndarray]:
    result = []
    for raw, dtype in zip(rows, dtypes, strict=True):
        values = np.empty(len(raw) // width_of(dtype), np.float32)
        decode_row(raw, dtype, values)
        result.append(values)
    return result


def block_of(
    rows: list[np.ndarray], dtypes: list[str], start: int, *, based: bool
) -> fused.StoredBlock:
    size = len(rows[0]) // width_of(dtypes[0])
    starts, kinds = fused.stored_starts([size] * len(rows), dtypes)
    buffer = np.zeros(int(starts[-1]), np.uint8)
    for raw, first in zip(rows, starts, strict=False):
        buffer[first : first + len(raw)] = raw
    return fused.StoredBlock(buffer, starts[:-1], kinds, start, size, based)
