"""The primitives as compiled loops over float32 arrays, for CPUs.

Every function here has a plain twin in the module that calls it, and the tests compare the two bit
for bit. numba compiles a function when it is first called and keeps the machine code on disk, so
that later processes only load it. Nothing may be reordered or contracted: `fastmath` stays off,
except in sums for the report, which are rounded to six digits.

Loops come in two shapes, and both must vectorise: over a whole block where one pass is enough, and
over chunks that stay in the L1 cache where several passes follow one another.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

_CHUNK = 2048
_LANES = 64
U32 = np.uint32
F32 = np.float32
_MAGNITUDE = U32(0x7FFFFFFF)
_INFINITY = U32(0x7F800000)


class Kernel:
    """A function that is compiled at its first call."""

    def __init__(
        self, function: Callable[..., Any], signature: str | list[str], fastmath: Any
    ) -> None:
        self._function, self._signature, self._fastmath = function, signature, fastmath
        self._compiled: Callable[..., Any] | None = None
        self._lock = threading.Lock()

    def __call__(self, *arguments: Any) -> Any:
        compiled = self._compiled
        if compiled is None:
            compiled = self.load()
        return compiled(*arguments)

    def load(self) -> Callable[..., Any]:
        """Compile, or load what an earlier process has compiled."""
        import numba

        with self._lock:
            if self._compiled is None:
                options = {"nogil": True, "error_model": "numpy", "fastmath": self._fastmath}
                try:
                    compiled = numba.njit(self._signature, cache=True, **options)(self._function)
                except RuntimeError as error:
                    if "cannot cache" not in str(error):
                        raise
                    # Neither our folder nor the user's cache can be written: compile each time.
                    compiled = numba.njit(self._signature, **options)(self._function)
                self._compiled = compiled
            return self._compiled


def _kernel(
    signature: str | list[str], *, fastmath: Any = False
) -> Callable[[Callable[..., Any]], Kernel]:
    return lambda function: Kernel(function, signature, fastmath)


@cache
def available() -> str:
    """Why the compiled primitives cannot be used; empty when they can."""
    try:
        import numba
    except ImportError as error:
        return f"numba cannot be imported ({error})"
    return "NUMBA_DISABLE_JIT is set" if numba.config.DISABLE_JIT else ""


# --- storage formats ------------------------------------------------------------------------------


@_kernel("boolean(u2[:, ::1], f4[:, ::1], f4[::1], boolean, boolean)")
def decode_bf16(raw, rows, base, has_base, deltas):
    """bfloat16 bits to float32; whether any is NaN or Inf.

    The first row of `raw` goes to `base` if there is one; the others to `rows`, less the base if
    `deltas`.
    """
    largest = U32(0)
    size = raw.shape[1]
    for begin in range(0, size, _CHUNK):
        minus = base[begin : begin + _CHUNK]
        for s in range(len(raw)):
            halves = raw[s, begin : begin + _CHUNK]
            is_base = has_base and s == 0
            result = minus if is_base else rows[s - has_base, begin : begin + _CHUNK]
            bits = result.view(np.uint32)
            for i in range(len(halves)):
                wide = U32(halves[i]) << U32(16)
                bits[i] = wide
                largest = max(largest, wide & _MAGNITUDE)
            if deltas and not is_base:
                for i in range(len(halves)):
                    result[i] = result[i] - minus[i]
    return largest >= _INFINITY


@_kernel("boolean(u2[::1], f4[::1])")
def decode_f16(raw, out):
    """float16 bits to float32; whether any is NaN or Inf.

    Moved into float32's place and scaled by 2^112, which also makes subnormals right.
    """
    bits = out.view(np.uint32)
    scale = F32(2.0**112)
    largest = U32(0)
    for i in range(len(raw)):
        magnitude = U32(raw[i]) & U32(0x7FFF)
        bits[i] = magnitude << U32(13)
        largest = max(largest, magnitude)
    for i in range(len(raw)):
        out[i] = out[i] * scale
    for i in range(len(raw)):
        half = U32(raw[i])
        special = _INFINITY if (half & U32(0x7C00)) == U32(0x7C00) else U32(0)
        bits[i] = bits[i] | special | ((half & U32(0x8000)) << U32(16))
    return largest >= U32(0x7C00)


@_kernel("boolean(f4[::1])")
def non_finite(values):
    """Whether any is NaN or Inf."""
    bits = values.view(np.uint32)
    largest = U32(0)
    for i in range(len(bits)):
        largest = max(largest, bits[i] & _MAGNITUDE)
    return largest >= _INFINITY


@_kernel("void(f4[::1], u2[::1])")
def encode_bf16(values, raw):
    """float32 to bfloat16 bits, to nearest, ties to even; every NaN becomes 0x7FC0."""
    bits = values.view(np.uint32)
    for i in range(len(bits)):
        wide = bits[i]
        rounded = (wide + U32(0x7FFF) + ((wide >> U32(16)) & U32(1))) >> U32(16)
        nan = (wide & _MAGNITUDE) > _INFINITY
        raw[i] = np.uint16(U32(0x7FC0) if nan else rounded)


@_kernel("boolean(f4[::1], u2[::1])")
def encode_f16(values, raw):
    """float32 to float16 bits, to nearest, ties to even; NaN becomes 0x7E00; whether any is Inf.

    Small ones are rounded by adding 0.5, whose last place is that of a float16 subnormal.
    """
    shifted = np.empty(_CHUNK, np.float32)
    shifted_bits = shifted.view(np.uint32)
    largest = U32(0)
    for begin in range(0, len(values), _CHUNK):
        part, halves = values[begin : begin + _CHUNK], raw[begin : begin + _CHUNK]
        bits = part.view(np.uint32)
        for i in range(len(part)):
            shifted[i] = abs(part[i]) + F32(0.5)
        for i in range(len(part)):
            wide = bits[i] & _MAGNITUDE
            odd = (wide >> U32(13)) & U32(1)
            normal = (wide + U32(0xC8000FFF) + odd) >> U32(13)
            small = shifted_bits[i] - U32(0x3F000000)
            half = small if wide < U32(0x38800000) else normal  # 2^-14
            half = U32(0x7C00) if wide >= U32(0x477FF000) else half  # rounds to 65536 or more
            half = U32(0x7E00) if wide > _INFINITY else half
            halves[i] = np.uint16(half | ((bits[i] >> U32(16)) & U32(0x8000)))
            largest = max(largest, wide)
    return largest >= U32(0x477FF000)


# --- sums -----------------------------------------------------------------------------------------


@_kernel("void(f4[:, ::1], f4[::1], f4[::1])")
def weighted_sum(rows, weights, out):
    """out = sum of weights[s] * rows[s] in order: a product, then an addition, each rounded."""
    sources, size = rows.shape
    for begin in range(0, size, _CHUNK):
        end = min(begin + _CHUNK, size)
        total = out[begin:end]
        for s in range(sources):
            row, weight = rows[s, begin:end], weights[s]
            if s == 0:
                for i in range(end - begin):
                    total[i] = row[i] * weight
            else:
                for i in range(end - begin):
                    total[i] = total[i] + row[i] * weight


@_kernel("void(f4[::1], f4, f4[::1])")
def add_scaled(base, scale, values):
    """values = base + scale * values: a product, then an addition, each rounded."""
    for i in range(len(values)):
        values[i] = base[i] + scale * values[i]


@_kernel("void(f4[::1], f4[::1], i8, f8[::1])")
def dot_runs(a, b, run, sums):
    """sums[r] = sum of a * b over run r in float64; the lanes are added in order."""
    lanes = np.empty(_LANES)
    for r in range(len(sums)):
        x, y = a[r * run : (r + 1) * run], b[r * run : (r + 1) * run]
        lanes[:] = 0.0
        whole = len(x) // _LANES * _LANES
        for begin in range(0, whole, _LANES):
            for lane in range(_LANES):
                lanes[lane] += np.float64(x[begin + lane]) * np.float64(y[begin + lane])
        for i in range(whole, len(x)):
            lanes[i - whole] += np.float64(x[i]) * np.float64(y[i])
        total = 0.0
        for lane in range(_LANES):
            total += lanes[lane]
        sums[r] = total


@_kernel("void(f4[::1], i8, f8[::1])")
def absolute_runs(a, run, sums):
    """sums[r] = sum of |a| over run r in float64; the lanes are added in order."""
    lanes = np.empty(_LANES)
    for r in range(len(sums)):
        x = a[r * run : (r + 1) * run]
        lanes[:] = 0.0
        whole = len(x) // _LANES * _LANES
        for begin in range(0, whole, _LANES):
            for lane in range(_LANES):
                lanes[lane] += abs(np.float64(x[begin + lane]))
        for i in range(whole, len(x)):
            lanes[i - whole] += abs(np.float64(x[i]))
        total = 0.0
        for lane in range(_LANES):
            total += lanes[lane]
        sums[r] = total


# --- magnitudes -----------------------------------------------------------------------------------


@_kernel("i8(f4[::1], u4, u4, u4, i4[::1])")
def count_range(values, low, high, shift, counts):
    """Count keys (bits of |x|) in [low, high] by (key - low) >> shift; returns how many are above.

    What lies inside is first moved together, without a branch that would be guessed wrong.
    """
    span = U32(high - low)
    above = 0
    places = np.empty(_CHUNK, np.uint32)
    inside = np.empty(_CHUNK, np.uint32)
    for begin in range(0, len(values), _CHUNK):
        bits = values[begin : begin + _CHUNK].view(np.uint32)
        larger = U32(0)
        for i in range(len(bits)):
            key = bits[i] & _MAGNITUDE
            larger += U32(key > high)
            places[i] = key - low
        above += larger
        found = 0
        for i in range(len(bits)):
            inside[found] = places[i]
            found += np.intp(places[i] <= span)
        for i in range(found):
            counts[inside[i] >> shift] += 1
    return above


@_kernel("void(f4[::1], u4[::1], i8[::1], i8[::1])")
def count_keys(values, candidates, above, equal):
    """For each candidate, add how many keys are larger and how many are equal."""
    for begin in range(0, len(values), _CHUNK):
        bits = values[begin : begin + _CHUNK].view(np.uint32)
        for c in range(len(candidates)):
            key = candidates[c]
            larger, same = U32(0), U32(0)
            for i in range(len(bits)):
                magnitude = bits[i] & _MAGNITUDE
                larger += U32(magnitude > key)
                same += U32(magnitude == key)
            above[c] += larger
            equal[c] += same


@_kernel("void(f4[:, ::1], u4[::1], i8[::1], f4[:, ::1])")
def trim(rows, thresholds, ties, out):
    """Rows where the key is above the threshold, or equal to it among the first `ties`; else 0.

    NaN is dropped: it is above no number.
    """
    for s in range(len(rows)):
        threshold, first = thresholds[s], ties[s]
        bits, result = rows[s, :first].view(np.uint32), out[s, :first].view(np.uint32)
        for i in range(len(bits)):
            key = bits[i] & _MAGNITUDE
            result[i] = bits[i] if (key >= threshold) & (key <= _INFINITY) else U32(0)
        bits, result = rows[s, first:].view(np.uint32), out[s, first:].view(np.uint32)
        for i in range(len(bits)):
            key = bits[i] & _MAGNITUDE
            result[i] = bits[i] if (key > threshold) & (key <= _INFINITY) else U32(0)


@_kernel("i8(f4[::1], u4, i8)")
def count_kept(values, threshold, ties):
    """How many `trim` keeps."""
    kept = 0
    bits = values[:ties].view(np.uint32)
    for i in range(len(bits)):
        key = bits[i] & _MAGNITUDE
        kept += (key >= threshold) & (key <= _INFINITY)
    bits = values[ties:].view(np.uint32)
    for i in range(len(bits)):
        key = bits[i] & _MAGNITUDE
        kept += (key > threshold) & (key <= _INFINITY)
    return kept


@_kernel("i8(f4[::1], u4, i8)")
def find_tie(values, threshold, ordinal):
    """The index of the ordinal-th (from 1) key that equals the threshold, or -1 - their number."""
    found = 0
    for begin in range(0, len(values), _CHUNK):
        bits = values[begin : begin + _CHUNK].view(np.uint32)
        here = U32(0)
        for i in range(len(bits)):
            here += U32((bits[i] & _MAGNITUDE) == threshold)
        if found + here >= ordinal:
            for i in range(len(bits)):
                found += (bits[i] & _MAGNITUDE) == threshold
                if found == ordinal:
                    return begin + i
        found += here
    return -1 - found


@_kernel(["i8(i4[::1], i4[::1], i8[::1])", "i8(i8[::1], i4[::1], i8[::1])"])
def not_empty(counts, places, found):
    """Move the bins that hold something together; returns how many there are."""
    size = 0
    for begin in range(0, len(counts), 64):
        bins = counts[begin : begin + 64]
        together = bins[0]
        for i in range(len(bins)):
            together |= bins[i]
        if together != 0:
            for i in range(len(bins)):
                if bins[i] > 0:
                    places[size] = begin + i
                    found[size] = bins[i]
                    size += 1
    return size


# --- random masks ---------------------------------------------------------------------------------


@_kernel("void(f4[:, ::1], u4[:, ::1], u4, f4[::1], f4[:, ::1])")
def drop(rows, words, low, factors, out):
    """rows * factor where the mixed index is below the limit, else 0 (see `kernels.mask`).

    Each row of `words` is k0, k1 and the limit; `low` is the first element's index.
    """
    for s in range(len(rows)):
        k0, k1, limit, factor = words[s, 0], words[s, 1], words[s, 2], factors[s]
        row, result = rows[s], out[s]
        for i in range(len(row)):
            # numba widens sums and products to 64 bits: cut them back.
            x = U32(low + U32(i)) ^ k0
            x = U32((x ^ (x >> U32(16))) * U32(0x21F0AAAD))
            x = U32((x ^ (x >> U32(15))) + k1)
            x = U32(x * U32(0xD35A2D97))
            x = U32((x ^ (x >> U32(15))) * U32(0x31848BAB))
            x ^= x >> U32(14)
            result[i] = row[i] * factor if x < limit else F32(0.0)


@_kernel("i8(i8, u4, u4, u4, u4)")
def count_masked(size, k0, k1, low, limit):
    """How many of `size` elements `drop` keeps."""
    kept = 0
    for i in range(size):
        x = U32(low + U32(i)) ^ k0
        x = U32((x ^ (x >> U32(16))) * U32(0x21F0AAAD))
        x = U32((x ^ (x >> U32(15))) + k1)
        x = U32(x * U32(0xD35A2D97))
        x = U32((x ^ (x >> U32(15))) * U32(0x31848BAB))
        x ^= x >> U32(14)
        kept += x < limit
    return kept


# --- sign election --------------------------------------------------------------------------------

NOTHING, WEIGHTS, COUNT = 0, 1, 2


@_kernel("void(f4[:, ::1], f4[::1], boolean, i8, f4, f4[::1])")
def disjoint_mean(rows, weights, weighted, divide_by, zero_sign, out):
    """See `kernels.elect.disjoint_mean`, whose operations these are, one by one."""
    sources, size = rows.shape
    elected = np.empty(_CHUNK, np.float32)
    divisor = np.empty(_CHUNK, np.float32)
    one = F32(1.0)
    for begin in range(0, size, _CHUNK):
        end = min(begin + _CHUNK, size)
        length = end - begin
        total = out[begin:end]
        for s in range(sources):
            row = rows[s, begin:end]
            vote = weights[s] if weighted else one
            if s == 0:
                for i in range(length):
                    elected[i] = row[i] * vote
            else:
                for i in range(length):
                    elected[i] = elected[i] + row[i] * vote
        for i in range(length):
            sign = zero_sign
            sign = one if elected[i] > 0 else sign
            sign = -one if elected[i] < 0 else sign
            elected[i] = sign
        total[:] = 0
        divisor[:] = 0
        for s in range(sources):
            row, weight = rows[s, begin:end], weights[s]
            vote = weight if weighted else one
            share = one if divide_by == COUNT else weight
            if divide_by == NOTHING:
                for i in range(length):
                    agrees = (row[i] * vote) * elected[i] > 0
                    total[i] = total[i] + (row[i] * weight if agrees else F32(0.0))
            else:
                for i in range(length):
                    agrees = (row[i] * vote) * elected[i] > 0
                    total[i] = total[i] + (row[i] * weight if agrees else F32(0.0))
                    divisor[i] = divisor[i] + (share if agrees else F32(0.0))
        if divide_by != NOTHING:
            for i in range(length):
                safe = one if abs(divisor[i]) < F32(1e-8) else divisor[i]
                total[i] = total[i] / safe


# --- statistics for the report ----------------------------------------------------------------

_SUMS = {"reassoc", "nsz"}


@_kernel("void(f4[:, ::1], f8[:, ::1])", fastmath=_SUMS)
def gram(rows, out):
    """out += the dot products between rows, to about six digits."""
    sources, size = rows.shape
    for begin in range(0, size, _CHUNK):
        for s in range(sources):
            a = rows[s, begin : begin + _CHUNK]
            for t in range(s, sources):
                b = rows[t, begin : begin + _CHUNK]
                part = F32(0.0)
                for i in range(len(a)):
                    part += a[i] * b[i]
                out[s, t] += part
                if s != t:
                    out[t, s] += part


@_kernel("UniTuple(f8, 2)(f4[::1], f4[::1])", fastmath=_SUMS)
def quick_change(base, merged):
    """sum of base^2 and of (merged - base)^2, to about six digits."""
    squares, changes = 0.0, 0.0
    for begin in range(0, len(base), _CHUNK):
        x, y = base[begin : begin + _CHUNK], merged[begin : begin + _CHUNK]
        square, change = F32(0.0), F32(0.0)
        for i in range(len(x)):
            square += x[i] * x[i]
            change += (y[i] - x[i]) * (y[i] - x[i])
        squares += square
        changes += change
    return squares, changes


@_kernel("i8(f4[:, ::1], i8[:, ::1], i8[:, ::1])")
def count_signs(rows, both, agree):
    """Add up, for each pair of rows, where both are non-zero, and where they agree in sign.

    Returns:
        elements on which some row is positive and another negative.
    """
    sources, size = rows.shape
    signs = np.empty((sources, _CHUNK), np.int32)
    low, high = np.empty(_CHUNK, np.int32), np.empty(_CHUNK, np.int32)
    conflict = 0
    for begin in range(0, size, _CHUNK):
        length = min(begin + _CHUNK, size) - begin
        low[:] = 0
        high[:] = 0
        for s in range(sources):
            row, sign = rows[s, begin : begin + length], signs[s]
            for i in range(length):
                sign[i] = np.int32(row[i] > 0) - np.int32(row[i] < 0)
                low[i] = min(low[i], sign[i])
                high[i] = max(high[i], sign[i])
        mixed = np.int32(0)
        for i in range(length):
            mixed += high[i] & -low[i]
        conflict += mixed
        for s in range(sources):
            for t in range(s, sources):
                a, b = signs[s], signs[t]
                present, product = np.int32(0), np.int32(0)
                for i in range(length):
                    p = a[i] * b[i]
                    product += p
                    present += p * p
                same = (present + product) // 2
                both[s, t] += present
                agree[s, t] += same
                if s != t:
                    both[t, s] += present
                    agree[t, s] += same
    return conflict
