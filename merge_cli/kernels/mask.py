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

from merge_cli.kernels.backend import Array, is_numpy, kernels_for, matrix

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_CHUNK = 2**32


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
        sources: each source's place in the recipe.
        density: for each source, the chance of being kept.
        factors: for each source, what is multiplied with what is kept; None for 1.
    """
    scale = [1.0] * len(rows) if factors is None else factors
    if is_numpy(rows[0]):
        return _compiled_drop(rows, seed, sources, name, start, density, scale)
    kept = [
        row.where(keep_mask(seed, source, name, start, row.numel(), share, row.device), 0.0)
        for row, source, share in zip(rows, sources, density, strict=True)
    ]
    return [row * factor for row, factor in zip(kept, scale, strict=True)] if factors else kept


def count_kept(
    rows: Sequence[Array],
    seed: int,
    sources: Sequence[int],
    name: str,
    start: int,
    density: Sequence[float],
) -> list[int]:
    """How many elements of each block its mask keeps."""
    if is_numpy(rows[0]):
        size = len(rows[0])
        return [
            _compiled_count(seed, source, name, start, size, share)
            for source, share in zip(sources, density, strict=True)
        ]
    return [
        int(keep_mask(seed, source, name, start, row.numel(), share, row.device).sum())
        for row, source, share in zip(rows, sources, density, strict=True)
    ]


def _compiled_drop(
    rows: Sequence[Array],
    seed: int,
    sources: Sequence[int],
    name: str,
    start: int,
    density: Sequence[float],
    factors: Sequence[float],
) -> list[Array]:
    import numpy as np

    from merge_cli.kernels import compiled

    whole = matrix(rows)
    parts = []
    scale = np.array(factors, np.float32)
    limits = [min(round(share * 2**32), 2**32 - 1) for share in density]
    for chunk, low, part in _chunks(start, whole.shape[1]):
        keys = [mask_key(seed, source, name, chunk) for source in sources]
        words = [(*key, limit) for key, limit in zip(keys, limits, strict=True)]
        # A block reaches into two chunks once in 2^32 elements; rows must be whole for the loop.
        given = np.ascontiguousarray(whole[:, part])
        result = np.empty_like(given)
        compiled.drop(given, np.array(words, np.uint32), np.uint32(low), scale, result)
        parts.append(result)
    out = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
    for row, share, factor, result in zip(whole, density, scale, out, strict=True):
        if round(share * 2**32) >= 2**32:  # nothing is dropped, not even by the last value
            np.multiply(row, factor, out=result)
    return list(out)


def _compiled_count(
    seed: int, source: int, name: str, start: int, size: int, density: float
) -> int:
    import numpy as np

    from merge_cli.kernels import compiled

    limit = round(density * 2**32)
    if limit >= 2**32:
        return size
    kept = 0
    for chunk, low, part in _chunks(start, size):
        k0, k1 = mask_key(seed, source, name, chunk)
        words = [np.uint32(word) for word in (k0, k1, low, limit)]
        kept += int(compiled.count_masked(part.stop - part.start, *words))
    return kept


def _chunks(start: int, size: int) -> Iterator[tuple[int, int, slice]]:
    """(chunk, first index within it, which elements): the key changes every 2^32 elements."""
    at = start
    while at < start + size:
        chunk = at // _CHUNK
        end = min(start + size, (chunk + 1) * _CHUNK)
        yield chunk, at - chunk * _CHUNK, slice(at - start, end - start)
        at = end


def keep_mask(
    seed: int, source: int, name: str, start: int, size: int, density: float, device: torch.device
) -> Tensor:
    """Boolean keep-mask of `size` elements from flat index `start`, true with chance `density`."""
    import torch

    limit = round(density * 2**32)
    if limit >= 2**32:
        return torch.ones(size, dtype=torch.bool, device=device)
    on_gpu = kernels_for(torch.empty(0, device=device))
    parts = []
    for chunk, low, part in _chunks(start, size):
        k0, k1 = mask_key(seed, source, name, chunk)
        length = part.stop - part.start
        if on_gpu is not None:
            parts.append(on_gpu.keep_mask(length, k0, k1, low, limit, device))
        else:
            parts.append(_uniform(low, length, k0, k1, device) < limit - 2**31)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def mask_key(seed: int, source: int, name: str, chunk: int) -> tuple[int, int]:
    """The two 32-bit words that key the mix."""
    text = f"{seed}\x1f{source}\x1f{name}\x1f{chunk}".encode()
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def words(seed: int, source: int, name: str, start: int, size: int, device: torch.device) -> Tensor:
    """The words that masks compare with a limit: int64 in [0, 2^32), from flat index `start`."""
    import torch

    parts = []
    for chunk, low, part in _chunks(start, size):
        key = mask_key(seed, source, name, chunk)
        parts.append(_uniform(low, part.stop - part.start, *key, device).to(torch.int64) + 2**31)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _uniform(low: int, size: int, k0: int, k1: int, device: torch.device) -> Tensor:
    """The mixed words, shifted by -2^31 so that comparing them as int32 orders them as uint32."""
    import torch

    # int32 wraps as uint32 does; only right shifts differ, and their sign bits are masked away.
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
