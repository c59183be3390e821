"""What matching is about: models with their tensors, and the output tensors that they make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

from merge_cli.checkpoint.tensors import Tensor, TensorMap
from merge_cli.errors import Problem
from merge_cli.planning.absent import in_short
from merge_cli.planning.equal_tensors import Integers
from merge_cli.planning.layers import (
    LayerIndex,
    LayerKeys,
    LayerPosition,
    members,
)
from merge_cli.planning.output_slices import OutputSlice
from merge_cli.sources.source import Source


class TensorMatch(NamedTuple):
    """One output tensor.

    Attributes:
        layer_position: its layer, and where that is in the slice.
        operands, base: the tensors of the formula; for a copy, the one that is copied.
        source: index of the source that `operands[0]` is from.
        copied: why it is copied, whatever the method; empty where it is merged.
    """

    name: str
    output_slice: OutputSlice
    layer_position: LayerPosition
    operands: tuple[Tensor, ...]
    base: Tensor | None
    source: int
    copied: str = ""


@dataclass
class TensorMatches:
    """What matching found.

    Attributes:
        integers: tensors that are copied, to be compared with those of the other sources.
        uneven: tensors that not every source has, by what happens to them and why.
    """

    matches: list[TensorMatch] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    integers: list[Integers] = field(default_factory=list)
    uneven: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    layer_keys: LayerKeys = field(default_factory=LayerKeys)

    def note(self, names: str, why: str, name: str) -> None:
        """Remember what is told of many tensors in one line: `names` are those of the sources."""
        self.uneven.setdefault((names, why), []).append(name)

    @property
    def notes(self) -> list[str]:
        """A line for all tensors that are treated alike for one reason."""
        return [
            f"{in_short(names)}: {message}; {why}" for (message, why), names in self.uneven.items()
        ]


@dataclass(frozen=True)
class Model:
    """A source with the tensors that it is taken to have (see heads.py)."""

    source: Source
    view: TensorMap
    layer_keys: LayerKeys

    @property
    def label(self) -> str:
        return self.source.label

    @cached_property
    def layer_index(self) -> LayerIndex:
        """What slices need to know; found for the first of them."""
        return LayerIndex(self.view, self.source.config, self.layer_keys)

    def parts(self, modules: Sequence[str]) -> dict[str, Model]:
        """The model's modules, as models; what none of them has goes by an empty name."""
        members_of = {name: members(name, modules, self.view) for name in modules}
        taken = {name for names in members_of.values() for name in names}
        members_of[""] = tuple(name for name in self.view if name not in taken)
        return {
            module: replace(self, view={name: self.view[name] for name in names})
            for module, names in members_of.items()
        }
