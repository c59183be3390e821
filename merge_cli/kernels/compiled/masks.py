"""Random masks: see `kernels.mask`, which writes the generator down."""

from __future__ import annotations

from merge_cli.kernels.compiled.kernel import F32, U32, kernel
from merge_cli.kernels.compiled.tile_measures import count_words_tile
from merge_cli.kernels.compiled.tiles import mixed_word


@kernel("void(f4[:, ::1], u4[:, ::1], u4, f4[::1], f4[:, ::1])")
def drop(rows, words, low, factors, out):
    """rows * factor where the mixed index is below the limit, else 0 (see `kernels.mask`).

    Each row of `words` is k0, k1 and the limit; `low` is the first element's index.
    """
    for s in range(len(rows)):
        k0, k1, limit, factor = words[s, 0], words[s, 1], words[s, 2], factors[s]
        row, result = rows[s], out[s]
        for i in range(len(row)):
            word = mixed_word(U32(low + U32(i)), k0, k1)
            result[i] = row[i] * factor if word < limit else F32(0.0)


@kernel("i8(i8, u4, u4, u4, u4)")
def count_masked(size, k0, k1, low, limit):
    """How many of `size` elements `drop` keeps."""
    return count_words_tile(size, k0, k1, limit, low)
