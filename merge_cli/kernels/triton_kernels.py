"""The numeric primitives as Triton kernels: the same bits as plain torch in one pass over memory.

Whoever imports this module needs triton. The references, which are also what runs without it, are
`keys.py` (count_range), `mask.py` (drop, keep_mask), `elect.py` (disjoint_mean) and `reduce.py`
(weighted_sum). NaNs come out in the same places; which NaN is left to the device.

What keeps the bits the same on a GPU:
- `_ROUNDED`: no product is fused with the sum after it; a quotient is IEEE, not approximate.
- Sources are taken in order inside a program, and everything that programs share is an integer.
- Weights travel in a tensor of the operands' dtype. As arguments of a kernel they would be float32.

32-bit words are handed over as int32, whatever their top bit, so that each kernel is compiled once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024  # eight elements for each of 4 * 32 threads
_COUNT_BLOCK = 4096  # larger: what a program gathers before it touches a shared counter
_ROUNDED = {"enable_fp_fusion": False}

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_NOTHING, _WEIGHTS, _COUNT = 0, 1, 2
_DIVISORS = {"nothing": _NOTHING, "weights": _WEIGHTS, "count": _COUNT}


def count_range(x: Tensor, low: int, high: int, shift: int, counts: Tensor) -> Tensor:
    """Add the histogram of the magnitudes between two bit patterns to `counts`.

    The key of an element is the bit pattern of |x|, 31 or 63 bits, which orders like |x|; a NaN
    has a key above that of Inf. Each key with low <= key <= high adds 1 to
    counts[(key - low) >> shift].

    Args:
        x: flat float32 or float64.
        counts: flat int32 on the device of `x`; no bin may reach 2^31.

    Returns:
        How many keys are above `high`: int64, 0-d, on the device of `x`.

    Raises:
        ValueError: a range that is not one, or that does not fit into `counts`.
    """
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"'x' must be float32 or float64 (got {x.dtype})")
    largest = 2**31 - 1 if x.dtype == torch.float32 else 2**63 - 1
    if not 0 <= low <= high <= largest:
        raise ValueError(f"need 0 <= low <= high <= {largest} (got {low} and {high})")
    if counts.dtype != torch.int32 or not counts.is_contiguous() or counts.device != x.device:
        raise ValueError("'counts' must be contiguous int32 on the device of 'x'")
    if (high - low) >> shift >= counts.numel():
        raise ValueError(
            f"'counts' has {counts.numel()} bins, {((high - low) >> shift) + 1} needed"
        )
    above = torch.zeros((), dtype=torch.int64, device=x.device)
    bits = _bits(x)
    size = bits.numel()
    if size:
        with _on(x):
            _count_range[(triton.cdiv(size, _COUNT_BLOCK),)](
                bits,
                size,
                low,
                high,
                shift,
                counts,
                above,
                largest,
                _COUNT_BLOCK,
                num_warps=8,
                **_ROUNDED,
            )
    return above


def drop(x: Tensor, k0: int, k1: int, low: int, limit: int) -> Tensor:
    """x where the mask of `mask.py` keeps it, else 0.

    Args:
        x: flat, of any floating dtype; element i has index (low + i) mod 2^32.
        k0, k1: the two words that key the mix, from `mask.mask_key`.
        limit: keep what mixes to less than this; from 0 to 2^32 - 1.
    """
    bits = _bits(x)
    out = torch.empty_like(bits)
    size = bits.numel()
    if size:
        with _on(x):
            _drop[(triton.cdiv(size, _BLOCK),)](
                bits, out, size, *_words(k0, k1, low, limit), _BLOCK, **_ROUNDED
            )
    return out.view(x.dtype)


def keep_mask(
    size: int, k0: int, k1: int, low: int, limit: int, device: torch.device | str
) -> Tensor:
    """The boolean mask that `drop` applies to `size` elements."""
    out = torch.empty(size, dtype=torch.uint8, device=device)
    if size:
        with _on(out):
            _keep_mask[(triton.cdiv(size, _BLOCK),)](
                out, size, *_words(k0, k1, low, limit), _BLOCK, **_ROUNDED
            )
    return out.view(torch.bool)


def disjoint_mean(
    stacked: Tensor,
    weights: Sequence[float],
    weighted_election: bool,
    divide_by: str,
    zero_sign: float,
) -> Tensor:
    """`elect.disjoint_mean` of the rows of `stacked`, (sources, size) float32 or float64."""
    if zero_sign not in (-1.0, 0.0, 1.0):
        raise ValueError(f"'zero_sign' must be -1, 0 or 1 (got {zero_sign})")
    divisor = _DIVISORS[divide_by]
    w = _weights(stacked, weights)
    sources, size = stacked.shape
    out = stacked.new_empty(size)
    if size:
        with _on(stacked):
            _disjoint_mean[(triton.cdiv(size, _BLOCK),)](
                stacked,
                w,
                out,
                sources,
                size,
                stacked.stride(0),
                weighted_election,
                divisor,
                float(zero_sign),
                _BLOCK,
                **_ROUNDED,
            )
    return out


def weighted_sum(stacked: Tensor, weights: Sequence[float]) -> Tensor:
    """`reduce.weighted_sum` of the rows of `stacked`, (sources, size) float32 or float64."""
    w = _weights(stacked, weights)
    sources, size = stacked.shape
    out = stacked.new_empty(size)
    if size:
        with _on(stacked):
            _weighted_sum[(triton.cdiv(size, _BLOCK),)](
                stacked, w, out, sources, size, stacked.stride(0), _BLOCK, **_ROUNDED
            )
    return out


def _on(x: Tensor) -> torch.cuda.device_of:
    """Makes the device of `x` the current one: triton launches there, on its current stream."""
    return torch.cuda.device_of(x)  # type: ignore[no-untyped-call]  # torch's


def _bits(x: Tensor) -> Tensor:
    """Flat `x` as integers: kernels that only look at patterns leave every NaN as it is."""
    if x.dim() != 1:
        raise ValueError(f"'x' must be flat (got shape {tuple(x.shape)})")
    return x.contiguous().view(_INTEGERS[x.element_size()])


def _weights(stacked: Tensor, weights: Sequence[float]) -> Tensor:
    """The weights rounded to the dtype of `stacked`, as torch rounds a number beside a tensor."""
    if stacked.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"'stacked' must be float32 or float64 (got {stacked.dtype})")
    if stacked.dim() != 2 or not len(stacked) or (stacked.shape[1] > 1 and stacked.stride(1) != 1):
        raise ValueError(f"'stacked' must be (sources, size), rows contiguous; got {stacked.shape}")
    if len(weights) != len(stacked):
        raise ValueError(f"{len(weights)} weights for {len(stacked)} sources")
    return torch.tensor(weights, dtype=torch.float64).to(stacked.dtype).to(stacked.device)


def _words(*words: int) -> list[int]:
    return [word - 2**32 if word >= 2**31 else word for word in words]


@triton.jit
def _span(size, BLOCK: tl.constexpr):
    """The element indices of this program, in int64, and which of them there are."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return i, i < size


@triton.jit(do_not_specialize=["low", "high", "shift"])
def _count_range(
    bits, size, low, high, shift, counts, above, MAGNITUDE: tl.constexpr, BLOCK: tl.constexpr
):
    i, there = _span(size, BLOCK)
    key = tl.load(bits + i, mask=there, other=0) & MAGNITUDE
    larger = tl.sum((there & (key > high)).to(tl.int32))
    tl.atomic_add(above, larger.to(tl.int64), mask=larger > 0, sem="relaxed")
    hit = there & (key >= low) & (key <= high)
    index = ((key - low) >> shift).to(tl.int32)
    # Where most keys share one bin (zeros, above all), adding them one by one would make the GPU
    # wait on one address. The lowest bin of the block is nearly always that one; it is added once.
    lowest = tl.min(tl.where(hit, index, 2147483647))
    in_lowest = hit & (index == lowest)
    number = tl.sum(in_lowest.to(tl.int32))
    tl.atomic_add(counts + lowest, number, mask=number > 0, sem="relaxed")
    tl.atomic_add(counts + index, 1, mask=hit & (index != lowest), sem="relaxed")


@triton.jit
def _kept(i, k0, k1, low, limit):
    """mask.py's mix of index low + i, compared; in uint32, which wraps and shifts in zeros."""
    x = i.to(tl.uint32) + low.to(tl.uint32, bitcast=True)
    x ^= k0.to(tl.uint32, bitcast=True)
    x ^= x >> 16
    x *= 0x21F0AAAD
    x ^= x >> 15
    x += k1.to(tl.uint32, bitcast=True)
    x *= 0xD35A2D97
    x ^= x >> 15
    x *= 0x31848BAB
    x ^= x >> 14
    return x < limit.to(tl.uint32, bitcast=True)


@triton.jit(do_not_specialize=["k0", "k1", "low", "limit"])
def _drop(bits, out, size, k0, k1, low, limit, BLOCK: tl.constexpr):
    i, there = _span(size, BLOCK)
    x = tl.load(bits + i, mask=there, other=0)
    tl.store(out + i, tl.where(_kept(i, k0, k1, low, limit), x, 0), mask=there)


@triton.jit(do_not_specialize=["k0", "k1", "low", "limit"])
def _keep_mask(out, size, k0, k1, low, limit, BLOCK: tl.constexpr):
    i, there = _span(size, BLOCK)
    tl.store(out + i, _kept(i, k0, k1, low, limit).to(tl.uint8), mask=there)


@triton.jit
def _value(stacked, w, s, i, there, stride):
    """Source s times its weight, rounded; and the source as it is."""
    x = tl.load(stacked + s * tl.cast(stride, tl.int64) + i, mask=there, other=0.0)
    return x * tl.load(w + s), x


@triton.jit(do_not_specialize=["sources"])
def _weighted_sum(stacked, w, out, sources, size, stride, BLOCK: tl.constexpr):
    i, there = _span(size, BLOCK)
    total, _ = _value(stacked, w, 0, i, there, stride)  # not added to 0, which would lose a -0
    for s in range(1, sources):
        value, _ = _value(stacked, w, s, i, there, stride)
        total += value
    tl.store(out + i, total, mask=there)


@triton.jit(do_not_specialize=["sources"])
def _disjoint_mean(
    stacked,
    w,
    out,
    sources,
    size,
    stride,
    WEIGHTED_ELECTION: tl.constexpr,
    DIVIDE_BY: tl.constexpr,
    ZERO_SIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i, there = _span(size, BLOCK)
    dtype = stacked.dtype.element_ty
    votes = tl.zeros([BLOCK], dtype=dtype)  # starting at 0 changes no sign: -0 elects like 0
    for s in range(sources):
        value, x = _value(stacked, w, s, i, there, stride)
        votes += value if WEIGHTED_ELECTION else x
    elected = tl.where(votes > 0, 1.0, tl.where(votes < 0, -1.0, ZERO_SIGN))  # NaN elects like 0
    total = tl.zeros([BLOCK], dtype=dtype)
    divisor = tl.zeros([BLOCK], dtype=dtype)
    for s in range(sources):  # the block's rows again, now from a cache
        value, x = _value(stacked, w, s, i, there, stride)
        agrees = ((value if WEIGHTED_ELECTION else x) * elected) > 0
        total += tl.where(agrees, value, 0.0)
        if DIVIDE_BY == 1:
            divisor += agrees.to(dtype) * tl.load(w + s)
        elif DIVIDE_BY == 2:
            divisor += agrees.to(dtype)
    if DIVIDE_BY != 0:
        smallest = tl.full([BLOCK], 1e-8, dtype)  # a bare 1e-8 would be the float32 in float64 too
        divisor = tl.where(tl.abs(divisor) < smallest, 1.0, divisor)
        # `/` is approximate in float32 and IEEE in float64, where there is no div_rn
        total = tl.div_rn(total, divisor) if dtype == tl.float32 else total / divisor
    tl.store(out + i, total, mask=there)
