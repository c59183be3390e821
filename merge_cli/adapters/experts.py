"""Stacking the factors of single experts, as PEFT stores the factors of a whole parameter.

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
from merge_cli.lora.expert_updates import ExpertPosition, wrapping_order

# The first version of PEFT that takes an expert's B A as [outputs, inputs], as it is written here.
NEWEST = "0.19.1"


@dataclass(frozen=True)
class _Parameter:
    module: str
    name: str


class ExpertStacks:
    """Collects the experts of each parameter, and writes the parameter after the last of them.

    Args:
        positions: of all experts that will be added, by name.
    """

    def __init__(self, writer: AdapterFolder, positions: Mapping[str, ExpertPosition]) -> None:
        self._writer, self._positions = writer, positions
        self._incomplete: dict[_Parameter, dict[int, Factors | None]] = {}
        self._siblings: dict[str, list[str]] = {}
        for position in positions.values():
            names = self._siblings.setdefault(position.module, [])
            if position.parameter not in names:
                names.append(position.parameter)

    def add(self, name: str, factors: Factors | None) -> None:
        """An expert's factors; None where it has no change."""
        position = self._positions[name]
        parameter = _Parameter(position.module, position.parameter)
        collected = self._incomplete.setdefault(parameter, {})
        collected[position.expert] = factors
        if len(collected) == position.count:
            del self._incomplete[parameter]
            self._write(parameter, [collected[i] for i in range(position.count)], position)

    def _write(
        self, parameter: _Parameter, experts: Iterable[Factors | None], position: ExpertPosition
    ) -> None:
        all_factors = list(experts)
        a, b, rank = _stacked(all_factors, position.shape)
        names = wrapping_order(self._siblings[parameter.module])
        depth = len(names) - 1 - names.index(parameter.name)
        wrapped = parameter.module + ".base_layer" * depth
        self._writer.put(f"{wrapped}.lora_A.weight", a)
        self._writer.put(f"{wrapped}.lora_B.weight", b)
        self._writer.parameters[f"{parameter.module}.{parameter.name}"] = rank


def _stacked(experts: list[Factors | None], shape: tuple[int, int]) -> tuple[Any, Any, int]:
    """Both matrices, numpy float32, and the rank that every expert has in them."""
    import numpy as np

    count = len(experts)
    rank = max((expert.rank for expert in experts if expert is not None), default=1)
    a = np.zeros((count, rank, shape[1]), np.float32)
    b = np.zeros((shape[0], rank, count), np.float32)
    for i, factors in enumerate(experts):
        if factors is not None:
            a[i, : factors.rank] = factors.right
            b[:, : factors.rank, i] = factors.left
    return a.reshape(count * rank, shape[1]), b.reshape(shape[0], rank * count), rank
