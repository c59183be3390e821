"""Factors of single experts, put together as PEFT keeps those of a whole parameter.

A [experts * rank, inputs], expert by expert; B [outputs, rank * experts], where the expert
changes fastest. Several parameters of a module are wrapped into one another, the first one
innermost: experts.base_layer.lora_A (gate_up_proj), experts.lora_A (down_proj).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from merge_cli.adapters.factors import Factors
from merge_cli.adapters.folder import AdapterFolder
from merge_cli.lora.experts import ExpertPosition, in_order

# The first version of PEFT that takes B A of an expert as [outputs, inputs], as we write it.
NEWEST = "0.19.1"


@dataclass(frozen=True)
class _Parameter:
    module: str
    name: str


class ExpertStacks:
    """Collects the experts of each parameter, and writes it when the last one is there.

    Args:
        places: of everything that will come, by any name.
    """

    def __init__(self, writer: AdapterFolder, places: Mapping[str, ExpertPosition]) -> None:
        self._writer, self._places = writer, places
        self._waiting: dict[_Parameter, dict[int, Factors | None]] = {}
        self._siblings: dict[str, list[str]] = {}
        for place in places.values():
            names = self._siblings.setdefault(place.module, [])
            if place.parameter not in names:
                names.append(place.parameter)

    def add(self, name: str, factors: Factors | None) -> None:
        """An expert's factors; None where it has no change."""
        place = self._places[name]
        parameter = _Parameter(place.module, place.parameter)
        known = self._waiting.setdefault(parameter, {})
        known[place.expert] = factors
        if len(known) == place.count:
            del self._waiting[parameter]
            self._write(parameter, [known[i] for i in range(place.count)], place)

    def _write(
        self, parameter: _Parameter, experts: Iterable[Factors | None], place: ExpertPosition
    ) -> None:
        own = list(experts)
        a, b, rank = _joined(own, place.shape)
        names = in_order(self._siblings[parameter.module])
        depth = len(names) - 1 - names.index(parameter.name)
        wrapped = parameter.module + ".base_layer" * depth
        self._writer.put(f"{wrapped}.lora_A.weight", a)
        self._writer.put(f"{wrapped}.lora_B.weight", b)
        self._writer.parameters[f"{parameter.module}.{parameter.name}"] = rank


def _joined(experts: list[Factors | None], shape: tuple[int, int]) -> tuple[Any, Any, int]:
    """Both matrices, numpy float32, and the rank that every expert has in them."""
    import numpy as np

    count = len(experts)
    rank = max((expert.rank for expert in experts if expert is not None), default=1)
    a = np.zeros((count, rank, shape[1]), np.float32)
    b = np.zeros((shape[0], rank, count), np.float32)
    for i, item in enumerate(experts):
        if item is not None:
            a[i, : item.rank] = item.right
            b[:, : item.rank, i] = item.left
    return a.reshape(count * rank, shape[1]), b.reshape(shape[0], rank * count), rank
