"""How the sources of a tensor relate: dot products and counts over blocks of its elements.

A block's first row is what the others are compared with (the base), the others are differences
from it. Counts are exact. Dot products are float64 sums of float32 sums over 2,048 elements
(compiled), or float64 throughout (torch); each run of elements is added in order, so that neither
blocks nor threads decide a bit.

Sums for the report: to about six digits, in whatever order is quick.

Nothing that is written into a model depends on them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from merge_cli.kernels.backend import Array, host_primitive, matrix, primitive
from merge_cli.kernels.keys import number
from merge_cli.kernels.kth_largest import kth_largest
from merge_cli.kernels.reduce import BLOCK_MULTIPLE

_ARRAYS = ("gram", "both", "agree", "equal", "large", "chance", "steps", "contest")
_SMALLEST = 2.0**-149  # the least float32 above 0: nothing that is 0 is among the largest


@dataclass
class Relations:
    """Sums over elements, for S sources; arrays are numpy's.

    Attributes:
        count: elements.
        gram: (S+1, S+1) dot products of the base and the deltas, float64.
        both, agree: (S, S) elements that both sources change, and those changed the same way.
        equal: (S, S) elements on which two sources hold the same value.
        large: (S, S) elements that are among the largest changes of both sources.
        chance: (S, S) as many as `large` would be if they lay independently, tensor by tensor.
        steps: (S,) elements that are changed, by one step of bfloat16 at most.
        contest: elements that two sources change or more, and those of them changed both ways.
    """

    count: int
    gram: Any
    both: Any
    agree: Any
    equal: Any
    large: Any
    chance: Any
    steps: Any
    contest: Any

    @classmethod
    def empty(cls, sources: int, *tensors: int) -> Relations:
        """Zeros; with a number of tensors, for each of so many."""
        import numpy as np

        both, agree, equal, large = np.zeros((4, *tensors, sources, sources), np.int64)
        return cls(
            count=0,
            gram=np.zeros((*tensors, sources + 1, sources + 1)),
            both=both,
            agree=agree,
            equal=equal,
            large=large,
            chance=np.zeros((*tensors, sources, sources)),
            steps=np.zeros((*tensors, sources), np.int64),
            contest=np.zeros((*tensors, 2), np.int64),
        )

    def add(self, other: Relations) -> None:
        """Sum in place."""
        self.count += other.count
        for name in _ARRAYS:
            total = getattr(self, name)
            total += getattr(other, name)

    def each(self, counts: Sequence[int]) -> Iterator[Relations]:
        """Those of each tensor among several, which have so many elements, with `chance`."""
        self.chance = _chance(self.large, counts)
        return map(Relations, counts, *(getattr(self, name) for name in _ARRAYS))

    def set_chance(self) -> None:
        """What `large` of this one tensor would be by chance."""
        self.chance = _chance(self.large, self.count)


def _chance(large: Any, counts: int | Sequence[int]) -> Any:
    """|A| |B| / n, for each pair of sources of each tensor."""
    import numpy as np

    sizes = np.diagonal(large, axis1=-2, axis2=-1).astype(float)
    products = sizes[..., :, None] * sizes[..., None, :]
    return products / np.maximum(counts, 1)[..., None, None]


def add_relations(rows: Sequence[Array], thresholds: Sequence[float], into: Relations) -> None:
    """Add a block; see `Relations`.

    Args:
        rows: (S+1) flat arrays of equal length: the base, then the deltas.
        thresholds: for each source, the magnitude from which on an entry counts as large.
    """
    into.count += len(rows[0])
    _add_sums(rows, [max(threshold, _SMALLEST) for threshold in thresholds], into)


def least_keys(thresholds: Sequence[float]) -> Any:
    """The keys (bits of |x|, numpy uint32) from which on a change counts as large."""
    import numpy as np

    least = [max(threshold, _SMALLEST) for threshold in thresholds]
    return np.array(least, np.float32).view(np.uint32)


@primitive()
def _add_sums(rows: Sequence[Array], least: Sequence[float], into: Relations) -> None:
    import torch

    stacked = torch.stack(list(rows))
    for start in range(0, stacked.shape[1], BLOCK_MULTIPLE):
        run = stacked[:, start : start + BLOCK_MULTIPLE]
        wide = run.double()
        into.gram += (wide @ wide.T).cpu().numpy()
        _count(run[0], run[1:], least, into)


@_add_sums.compiled
def _add_sums_compiled(rows: Sequence[Array], least: Sequence[float], into: Relations) -> None:

    from merge_cli.kernels import compiled

    stacked = matrix(rows)
    compiled.gram(stacked, into.gram)
    compiled.count_relations(
        stacked,
        least_keys(least),
        into.both,
        into.agree,
        into.equal,
        into.large,
        into.steps,
        into.contest,
    )


def _count(base: Any, deltas: Any, least: Sequence[float], into: Relations) -> None:
    """The counts of a run, as they are defined."""
    import torch

    signs = deltas.sign().double()  # products of whole numbers: exact
    present = signs.abs()
    together, difference = present @ present.T, signs @ signs.T
    into.both += _whole(together)
    into.agree += _whole((together + difference) / 2)
    magnitudes = deltas.abs()
    limits = torch.tensor(least, dtype=deltas.dtype, device=deltas.device)
    top = (magnitudes >= limits[:, None]).double()
    into.large += _whole(top @ top.T)
    into.equal += _whole((deltas[:, None] == deltas[None]).sum(-1))
    _, exponent = torch.frexp(base)  # |x| = m 2^e with m from 1/2 to 1
    step = torch.ldexp(torch.ones_like(base), exponent - 8)
    step = step.where((base != 0) & base.isfinite(), 0.0)
    into.steps += _whole(((magnitudes <= step) & (deltas != 0)).sum(-1))
    changed = present.sum(0)
    several = changed > 1
    mixed = several & (signs.sum(0).abs() != changed)
    into.contest += _whole(torch.stack([several.sum(), mixed.sum()]))


def _whole(counts: Any) -> Any:
    return counts.round().long().cpu().numpy()


def top_count(size: int, share: float) -> int:
    """How many of so many elements are the largest `share`: at least one."""
    return max(1, round(share * size))


@host_primitive
def top_threshold(values: Any, share: float) -> float:
    """The least of the largest `share` of magnitudes, at least one of them.

    Args:
        values: flat numpy array, not empty.
    """
    import numpy as np

    return float(np.sort(np.abs(values))[-top_count(len(values), share)])


@top_threshold.compiled
def _top_threshold_compiled(values: Any, share: float) -> float:
    import numpy as np

    if values.dtype != np.float32:
        return top_threshold.reference(values, share)
    ((key, _),) = kth_largest([values], [top_count(len(values), share)])
    return number(key, 31)


@primitive()
def squares(base: Array, merged: Array) -> tuple[float, float]:
    """sum of base^2, and of (merged - base)^2."""
    change = merged - base
    return float(base @ base), float(change @ change)


@squares.compiled
def _squares_compiled(base: Array, merged: Array) -> tuple[float, float]:
    from merge_cli.kernels import compiled

    result: tuple[float, float] = compiled.quick_change(base, merged)
    return result


def add_gram(rows: Sequence[Array], total: Any, *, pairs: bool) -> None:
    """Add the dot products between rows to `total`; only those with themselves unless `pairs`."""
    if not pairs:
        for i, row in enumerate(rows):
            total[i, i] += float(row @ row)
        return
    _add_products(rows, total)


@primitive()
def _add_products(rows: Sequence[Array], total: Any) -> None:
    import torch

    stacked = torch.stack(list(rows))
    total += (stacked @ stacked.T).double().cpu().numpy()


@_add_products.compiled
def _add_products_compiled(rows: Sequence[Array], total: Any) -> None:
    from merge_cli.kernels import compiled

    compiled.gram(matrix(rows), total)


@primitive()
def add_signs(rows: Sequence[Array], both: Any, agree: Any) -> int:
    """Add, for each pair of rows, on how many elements both are non-zero, and where they agree.

    Returns:
        the number of elements on which some are positive and others negative.
    """
    import torch

    sign = torch.stack(list(rows)).sign()
    present = sign.abs()
    together = (present @ present.T).round().long().cpu().numpy()
    difference = (sign @ sign.T).round().long().cpu().numpy()  # agreeing minus disagreeing
    both += together
    agree += (together + difference) // 2
    return int(((sign.amax(0) > 0) & (sign.amin(0) < 0)).sum())


@add_signs.compiled
def _add_signs_compiled(rows: Sequence[Array], both: Any, agree: Any) -> int:
    from merge_cli.kernels import compiled

    return int(compiled.count_signs(matrix(rows), both, agree))
