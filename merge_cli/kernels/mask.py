"""Random masks that depend on the element, not on the order of drawing.

The keep-bit of an element is a function of (seed, source, tensor name, element index), so a mask
is the same on every device, in any order, in blocks of any size. Written down exactly, since other
implementations must agree bit for bit:

    key    k0, k1 = the two little-endian uint32 of
           blake2b(f"{seed}\\x1f{source}\\x1f{name}\\x1f{index >> 32}", digest_size=8)
    mix    x = index mod 2^32
           x ^= k0;  x ^= x >> 16;  x *= 0x21F0AAAD;  x ^= x >> 15
           x += k1;                 x *= 0xD35A2D97;  x ^= x >> 15
                                    x *= 0x31848BAB;  x ^= x >> 14      (all mod 2^32)
    keep   x < round(density * 2^32)

The mix is a three-round integer hash (constants from Wellons' hash prospector), keyed before the
first two. The third round is needed: without it, elements that are a multiple of 64 apart (rows of
a matrix) are correlated by up to 0.04, which `tests/methods/test_oracles.py` would see. All 32
bits are compared, so density 0.53 means 0.53.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from merge_cli.kernels.backend import Array, matrix, primitive

if TYPE_CHECKING:
    import torch
    from torch import Tensor

WORDS = 2**32  # values of a word; and elements that share a key, which a 32-bit index tells apart


@primitive()
def drop(
    rows: Sequence[Array],
    seed: int,
    sources: Sequence[int],
    name: str,
    start: int,
    density: Sequence[float],
    factors: Sequence[float] | None = None,
) -> list[Array]:
    """Flat blocks with each element zeroed unless its mask keeps it.

    Args:
        rows: each source's elements from flat index `start` of the tensor called `name`.
        sources: each source's index in the recipe.
        density: for each source, the chance of being kept.
        factors: for each source, what is multiplied with what is kept; None for 1.
    """
    kept_rows = [
        row.where(keep_mask(seed, source, name, start, row.numel(), share, row.device), 0.0)
        for row, source, share in zip(rows, sources, density, strict=True)
    ]
    if factors is None:
        return kept_rows
    return [row * factor for row, factor in zip(kept_rows, factors, strict=True)]


@drop.compiled
def _drop_compiled(
    rows: Sequence[Array],
    seed: int,
    sources: Sequence[int],
    name: str,
    start: int,
    density: Sequence[float],
    factors: Sequence[float] | None = None,
) -> list[Array]:
    import numpy as np

    from merge_cli.kernels import compiled

    stacked = matrix(rows)
    parts = []
    scale = np.array([1.0] * len(rows) if factors is None else factors, np.float32)
    # A limit of 2^32 (density 1) does not fit into the loop's 32 bits: those rows are done below.
    limits = [min(mask_limit(share), WORDS - 1) for share in density]
    for high, low, part in _keyed_parts(start, stacked.shape[1]):
        keys = [mask_key(seed, source, name, high) for source in sources]
        words = [(*key, limit) for key, limit in zip(keys, limits, strict=True)]
        # Nearly always the whole block, without a copy: it has two keys once in 2^32 elements.
        contiguous = np.ascontiguousarray(stacked[:, part])
        result = np.empty_like(contiguous)
        compiled.drop(contiguous, np.array(words, np.uint32), np.uint32(low), scale, result)
        parts.append(result)
    out = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
    for row, share, factor, result in zip(stacked, density, scale, out, strict=True):
        if mask_limit(share) >= WORDS:  # nothing is dropped, not even by the last value
            np.multiply(row, factor, out=result)
    return list(out)


@primitive()
def count_kept(
    rows: Sequence[Array],
    seed: int,
    sources: Sequence[int],
    name: str,
    start: int,
    density: Sequence[float],
) -> list[int]:
    """How many elements of each block its mask keeps."""
    return [
        int(keep_mask(seed, source, name, start, row.numel(), share, row.device).sum())
        for row, source, share in zip(rows, sources, density, strict=True)
    ]


@count_kept.compiled
def _count_kept_compiled(
    rows: Sequence[Array],
    seed: int,
    sources: Sequence[int],
    name: str,
    start: int,
    density: Sequence[float],
) -> list[int]:
    size = len(rows[0])
    return [
        _count_compiled(seed, source, name, start, size, share)
        for source, share in zip(sources, density, strict=True)
    ]


def _count_compiled(
    seed: int, source: int, name: str, start: int, size: int, density: float
) -> int:
    import numpy as np

    from merge_cli.kernels import compiled

    limit = mask_limit(density)
    if limit >= WORDS:
        return size
    count = 0
    for high, low, part in _keyed_parts(start, size):
        k0, k1 = mask_key(seed, source, name, high)
        words = [np.uint32(word) for word in (k0, k1, low, limit)]
        count += int(compiled.count_masked(part.stop - part.start, *words))
    return count


def _keyed_parts(start: int, size: int) -> Iterator[tuple[int, int, slice]]:
    """A span's parts of one key: (index >> 32, the first one's index mod 2^32, which elements)."""
    index = start
    while index < start + size:
        high = index // WORDS
        end = min(start + size, (high + 1) * WORDS)
        yield high, index - high * WORDS, slice(index - start, end - start)
        index = end


def keep_mask(
    seed: int, source: int, name: str, start: int, size: int, density: float, device: torch.device
) -> Tensor:
    """Boolean keep-mask of `size` elements from flat index `start`, true with chance `density`."""
    import torch

    limit = mask_limit(density)
    if limit >= WORDS:
        return torch.ones(size, dtype=torch.bool, device=device)
    parts = []
    for high, low, part in _keyed_parts(start, size):
        k0, k1 = mask_key(seed, source, name, high)
        parts.append(_below(part.stop - part.start, k0, k1, low, limit, device))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@primitive(position=5)
def _below(size: int, k0: int, k1: int, low: int, limit: int, device: torch.device) -> Tensor:
    """Which words of `size` elements, from index `low` mod 2^32 on, are less than `limit`."""
    return _mixed(size, k0, k1, low, device) < limit - 2**31


@_below.triton
def _below_triton(
    size: int, k0: int, k1: int, low: int, limit: int, device: torch.device
) -> Tensor:
    from merge_cli.kernels import triton_kernels

    return triton_kernels.keep_mask(size, k0, k1, low, limit, device)


def mask_limit(density: float) -> int:
    """What words are compared with: from `WORDS` on, all are kept."""
    return round(density * WORDS)


def mask_key(seed: int, source: int, name: str, high: int) -> tuple[int, int]:
    """The two 32-bit words that key the mix; `high` is index >> 32."""
    text = f"{seed}\x1f{source}\x1f{name}\x1f{high}".encode()
    key = hashlib.blake2b(text, digest_size=8).digest()
    return int.from_bytes(key[:4], "little"), int.from_bytes(key[4:], "little")


def random_words(
    seed: int, source: int, name: str, start: int, size: int, device: torch.device
) -> Tensor:
    """The words that masks compare with a limit: int64 in [0, 2^32), from flat index `start`."""
    import torch

    parts = []
    for high, low, part in _keyed_parts(start, size):
        k0, k1 = mask_key(seed, source, name, high)
        mixed = _mixed(part.stop - part.start, k0, k1, low, device)
        parts.append(mixed.to(torch.int64) + 2**31)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _mixed(size: int, k0: int, k1: int, low: int, device: torch.device) -> Tensor:
    """The mixed words, shifted by -2^31 so that comparing them as int32 orders them as uint32."""
    import torch

    # torch supports few operations on uint32, so that int32 stands for it: sums and products wrap
    # alike; only right shifts differ, and the sign bits that they copy in are masked away.
    # The same lines in uint32: `compiled/masks.py` and `triton_kernels._kept`.
    index = torch.arange(low, low + size, dtype=torch.int64, device=device)
    x = index.to(torch.int32) if low + size <= 2**31 else _wrap(index)
    x ^= _signed(k0)
    x ^= (x >> 16) & 0xFFFF
    x *= _signed(0x21F0AAAD)
    x ^= (x >> 15) & 0x1FFFF
    x += _signed(k1)
    x *= _signed(0xD35A2D97)
    x ^= (x >> 15) & 0x1FFFF
    x *= _signed(0x31848BAB)
    x ^= (x >> 14) & 0x3FFFF
    return x ^ _signed(0x80000000)


def _wrap(index: Tensor) -> Tensor:
    """int64 to int32 modulo 2^32, without relying on how a device casts what does not fit."""
    import torch

    return ((index + 2**31) % 2**32 - 2**31).to(torch.int32)


def _signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word
