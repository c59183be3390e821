"""Sums of tensors added up: by layer, by kind of module, by both, and all together."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from itertools import compress

from merge_cli.analysis.measures import Measures, measures_of
from merge_cli.analysis.modules import KINDS, kind_of
from merge_cli.engine.layers import layer_key_of
from merge_cli.engine.plan import TensorTask
from merge_cli.kernels.relate import Relations


class GroupSums:
    """The measures of every grouping.

    Args:
        sums: one for each task.
        base: whether the models were compared with a base.
    """

    def __init__(
        self, tasks: Sequence[TensorTask], sums: Sequence[Relations], *, base: bool
    ) -> None:
        self._tasks, self._sums, self._base = tasks, sums, base
        places = [layer_key_of(task.name) for task in tasks]
        self._layers = [place.index if place else None for place in places]
        self._kinds = [kind_of(task.name) for task in tasks]

    def total(self) -> Measures | None:
        """None where there is nothing."""
        same = [0] * len(self._tasks)
        return next(self._added(same, ["all tensors"] * len(same)), None)

    def inner(self) -> Measures | None:
        """All layers together, without embeddings, head and final norm; None without layers."""
        inside = [layer is not None for layer in self._layers]
        same = [0] * len(inside)
        return next(self._added(same, ["all layers"] * len(inside), chosen=inside), None)

    def each(self) -> tuple[Measures, ...]:
        """Every tensor."""
        found = zip(self._tasks, self._layers, self._kinds, self._sums, strict=True)
        return tuple(
            measures_of(sums, task.name, layer=layer, kind=kind, base=self._base)
            for task, layer, kind, sums in found
        )

    def layers(self) -> tuple[Measures, ...]:
        """Every layer, and the tensors that belong to none, in the plan's order."""
        groups = [task.group for task in self._tasks]
        return tuple(self._added(groups, groups, self._layers))

    def kinds(self) -> tuple[Measures, ...]:
        """Every kind of module that there is, in the order of `KINDS`."""
        found = {one.name: one for one in self._added(self._kinds, self._kinds, None, self._kinds)}
        return tuple(found[kind] for kind in KINDS if kind in found)

    def cells(self) -> tuple[Measures, ...]:
        """Every kind of module in every layer."""
        inside = [layer is not None for layer in self._layers]
        groups = [task.group for task in self._tasks]
        keys = list(zip(groups, self._kinds, strict=True))
        return tuple(self._added(keys, groups, self._layers, self._kinds, inside))

    def _added(
        self,
        keys: Sequence[Hashable],
        names: Sequence[str],
        layers: Sequence[int | None] | None = None,
        kinds: Sequence[str] | None = None,
        chosen: Sequence[bool] | None = None,
    ) -> Iterator[Measures]:
        """Measures of the tasks with one key, for every key in order of appearance."""
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
