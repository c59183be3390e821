"""The numbers of an analysis, from sums over elements: norms, cosines, overlaps, conflicts.

docs/analyze.md has the formulas. Sums are grouped by layer, by kind of module, by both, and over
all tensors. Numbers are rounded to six digits; beyond those machines differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import compress

from merge_cli.analysis.model_set import KINDS, kind_of
from merge_cli.kernels.measures import Relations
from merge_cli.planning.layers import layer_key_of
from merge_cli.planning.plan import TensorTask

Row = tuple[float | None, ...]
Matrix = tuple[Row, ...]


@dataclass(frozen=True)
class Measures:
    """The measures of a tensor, a layer, a kind of module, or all tensors, for S sources.

    With a base, δ is a source's change. Without a base, measures that need δ are None.

    Attributes:
        name: of the tensor or group.
        layer: its number, where the group is one layer; `kind` is the module's.
        count: elements.
        base_norm: ‖θ₀‖.
        norm, relative_norm: ‖δ‖ and ‖δ‖/‖θ₀‖; without a base `norm` is ‖θ‖.
        base_cosine: cosine between each source's weights and the base's.
        unchanged: share of elements that equal the base's.
        one_step: share of the changed elements that moved by one step of bfloat16 or less.
        cosine: between each two sources' δ; without a base between their weights.
        distance: ‖θᵢ − θⱼ‖ over the geometric mean of the two norms.
        equal: share of elements on which two sources hold the same value.
        sign_agreement: of the elements that both sources change, the share changed the same way.
        shared: share of elements that two or more sources change.
        conflict: share of elements that some sources raise and others lower.
        overlap: of two sources' largest changes, the share that both have (of the smaller set).
        overlap_chance: what `overlap` would be if they were independent.
    """

    name: str
    layer: int | None
    kind: str | None
    count: int
    base_norm: float | None
    norm: Row
    relative_norm: Row | None
    base_cosine: Row | None
    unchanged: Row | None
    one_step: Row | None
    cosine: Matrix | None
    distance: Matrix
    equal: Matrix
    sign_agreement: Matrix | None
    shared: float | None
    conflict: float | None
    overlap: Matrix | None
    overlap_chance: Matrix | None


def measures_of(
    sums: Relations, name: str, *, layer: int | None = None, kind: str | None = None, base: bool
) -> Measures:
    """Measures from sums.

    Args:
        base: whether the first row is a base; otherwise it is the first source.
    """
    gram, weights = sums.gram.tolist(), _weights_gram(sums)
    full = _norms(weights)
    distance, equal = _distances(gram, full, base), _equal(sums, base)
    if not base:
        return Measures(
            name,
            layer,
            kind,
            sums.count,
            None,
            tuple(map(rounded, full)),
            None,
            None,
            None,
            None,
            _cosines(weights, full),
            distance,
            equal,
            None,
            None,
            None,
            None,
            None,
        )
    deltas = [row[1:] for row in gram[1:]]
    theta = math.sqrt(gram[0][0])
    size = range(len(deltas))
    several = len(deltas) > 1
    norms = _norms(deltas)
    both, large = sums.both.tolist(), sums.large.tolist()
    changed = [both[s][s] for s in size]
    smaller = [[min(large[s][s], large[t][t]) for t in size] for s in size]
    shared, conflict = sums.contest.tolist()
    return Measures(
        name=name,
        layer=layer,
        kind=kind,
        count=sums.count,
        base_norm=rounded(theta),
        norm=tuple(map(rounded, norms)),
        relative_norm=tuple(_ratio(norm, theta) for norm in norms),
        base_cosine=tuple(_bounded(_ratio(weights[0][s + 1], full[0] * full[s + 1])) for s in size),
        unchanged=tuple(_share(sums.count - n, sums.count) for n in changed),
        one_step=tuple(map(_ratio, sums.steps.tolist(), changed)),
        cosine=_cosines(deltas, norms) if several else None,
        distance=distance,
        equal=equal,
        sign_agreement=_divided(sums.agree.tolist(), both) if several else None,
        shared=_ratio(shared, sums.count) if several else None,
        conflict=_ratio(conflict, sums.count) if several else None,
        overlap=_divided(large, smaller) if several else None,
        overlap_chance=_divided(sums.chance.tolist(), smaller) if several else None,
    )


def _weights_gram(sums: Relations) -> list[list[float]]:
    """Dot products between all models' weights: θᵢ = θ₀ + δᵢ, with δ = 0 for the first."""
    gram = sums.gram.copy()
    cross = sums.gram[0].copy()
    cross[0] = 0.0
    gram[0, :] = gram[:, 0] = 0.0
    dots: list[list[float]] = (sums.gram[0, 0] + cross[:, None] + cross[None] + gram).tolist()
    return dots


def _distances(gram: Sequence[Sequence[float]], norms: Sequence[float], base: bool) -> Matrix:
    """‖θᵢ − θⱼ‖ = ‖δᵢ − δⱼ‖, with δ = 0 for the first, over the geometric mean of the norms."""

    def distance(i: int, j: int) -> float | None:
        i, j = i + base, j + base
        if i == j:
            return 0.0
        dot = gram[i][j] if i else 0.0  # i < j
        square = (gram[i][i] if i else 0.0) + gram[j][j] - 2 * dot
        return _ratio(math.sqrt(max(0.0, square)), math.sqrt(norms[i] * norms[j]))

    return _symmetric(len(gram) - base, distance)


def _equal(sums: Relations, base: bool) -> Matrix:
    """Shares of equal elements; without a base, the first model has δ = 0."""
    counts = sums.equal.tolist()
    if not base:
        same = [sums.count - row[s] for s, row in enumerate(sums.both.tolist())]
        counts = [[sums.count, *same], *([n, *row] for n, row in zip(same, counts, strict=True))]
    return _symmetric(len(counts), lambda i, j: _share(counts[i][j], sums.count))


def _norms(gram: Sequence[Sequence[float]]) -> list[float]:
    return [math.sqrt(max(0.0, row[i])) for i, row in enumerate(gram)]


def _cosines(gram: Sequence[Sequence[float]], norms: Sequence[float]) -> Matrix:
    def cosine(i: int, j: int) -> float | None:
        if i == j:
            return 1.0 if norms[i] else None
        return _bounded(_ratio(gram[i][j], norms[i] * norms[j]))

    return _symmetric(len(gram), cosine)


def _divided(part: Sequence[Sequence[float]], total: Sequence[Sequence[float]]) -> Matrix:
    return _symmetric(len(part), lambda i, j: _ratio(part[i][j], total[i][j]))


def _symmetric(size: int, value: Callable[[int, int], float | None]) -> Matrix:
    """The matrix of value(i, j), which is asked for i <= j alone."""
    rows: list[list[float | None]] = [[None] * size for _ in range(size)]
    for i in range(size):
        for j in range(i, size):
            rows[i][j] = rows[j][i] = value(i, j)
    return tuple(map(tuple, rows))


def _ratio(part: float, total: float) -> float | None:
    if part == total:  # often: a source with itself
        return 1.0 if total else None
    return rounded(part / total) if total else None


def _share(part: int, total: int) -> float | None:
    """A share that is 1 only if the two counts are equal."""
    share = _ratio(part, total)
    return share if share != 1.0 or part == total else 0.999999


def _bounded(cosine: float | None) -> float | None:
    """Rounding may leave the cosine of a vector with itself a little above 1."""
    return None if cosine is None else max(-1.0, min(1.0, cosine))


def rounded(value: float) -> float:
    return float(f"{value:.6g}")


def pairs(matrix: Sequence[Sequence[float | None]] | None) -> list[tuple[int, int, float]]:
    """(i, j, value) for every pair i < j that has one."""
    return [
        (i, j, value)
        for i, row in enumerate(matrix or ())
        for j, value in enumerate(row)
        if i < j and value is not None
    ]


class GroupSums:
    """Measures by group, from the sums of each tensor.

    Args:
        sums: one for each task.
        base: whether the models are compared with a base.
    """

    def __init__(
        self, tasks: Sequence[TensorTask], sums: Sequence[Relations], *, base: bool
    ) -> None:
        self._tasks, self._sums, self._base = tasks, sums, base
        keys = [layer_key_of(task.name) for task in tasks]
        self._layers = [key.number if key else None for key in keys]
        self._kinds = [kind_of(task.name) for task in tasks]

    def total(self) -> Measures | None:
        """All tensors together; None if there are none."""
        same = [0] * len(self._tasks)
        return next(self._grouped(same, ["all tensors"] * len(same)), None)

    def inner(self) -> Measures | None:
        """All layers together, without embeddings, head and final norm; None without layers."""
        inside = [layer is not None for layer in self._layers]
        same = [0] * len(inside)
        return next(self._grouped(same, ["all layers"] * len(inside), chosen=inside), None)

    def each(self) -> tuple[Measures, ...]:
        """Each tensor."""
        rows = zip(self._tasks, self._layers, self._kinds, self._sums, strict=True)
        return tuple(
            measures_of(sums, task.name, layer=layer, kind=kind, base=self._base)
            for task, layer, kind, sums in rows
        )

    def layers(self) -> tuple[Measures, ...]:
        """Each layer, and the tensors outside layers, in the plan's order."""
        groups = [task.group for task in self._tasks]
        return tuple(self._grouped(groups, groups, self._layers))

    def kinds(self) -> tuple[Measures, ...]:
        """Each kind of module in the models, in the order of `KINDS`."""
        by_kind = {
            measures.name: measures
            for measures in self._grouped(self._kinds, self._kinds, None, self._kinds)
        }
        return tuple(by_kind[kind] for kind in KINDS if kind in by_kind)

    def cells(self) -> tuple[Measures, ...]:
        """Each kind of module in each layer."""
        inside = [layer is not None for layer in self._layers]
        groups = [task.group for task in self._tasks]
        keys = list(zip(groups, self._kinds, strict=True))
        return tuple(self._grouped(keys, groups, self._layers, self._kinds, inside))

    def _grouped(
        self,
        keys: Sequence[Hashable],
        names: Sequence[str],
        layers: Sequence[int | None] | None = None,
        kinds: Sequence[str] | None = None,
        chosen: Sequence[bool] | None = None,
    ) -> Iterator[Measures]:
        """Measures of the tasks with one key, for each key in order of appearance."""
        totals: dict[Hashable, Relations] = {}
        first: dict[Hashable, int] = {}
        numbers = range(len(self._tasks))
        for i in numbers if chosen is None else compress(numbers, chosen):
            if keys[i] not in totals:
                first[keys[i]] = i
                totals[keys[i]] = Relations.empty(len(self._sums[i].steps))
            totals[keys[i]].add(self._sums[i])
        for key, sums in totals.items():
            i = first[key]
            yield measures_of(
                sums,
                names[i],
                layer=layers[i] if layers else None,
                kind=kinds[i] if kinds else None,
                base=self._base,
            )
