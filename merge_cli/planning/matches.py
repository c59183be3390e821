"""What matching is about: models with their tensors, and the output tensors that they make."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import repeat
from operator import attrgetter
from typing import NamedTuple, overload

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


@dataclass(frozen=True, eq=False)
class AlikeMatches(Sequence[TensorMatch]):
    """Matches of one slice, all of them merged, as columns: objects are made when asked for.

    Attributes:
        names, layer_positions, shapes: of each output tensor.
        operands: for each operand of the slice a column of tensors.
        bases: a column, too; None where the formula has no base.
        dtypes: of the base and every operand, where there is no `dtype:`, a column for each.
        source: index of the source that the first operands are from.
    """

    output_slice: OutputSlice
    names: Sequence[str]
    layer_positions: Sequence[LayerPosition]
    shapes: Sequence[tuple[int, ...]]
    operands: Sequence[Sequence[Tensor]]
    bases: Sequence[Tensor] | None
    dtypes: Sequence[Sequence[str]]
    source: int

    @cached_property
    def _matches(self) -> list[TensorMatch]:
        rows = zip(
            self.names,
            repeat(self.output_slice),
            self.layer_positions,
            zip(*self.operands, strict=True),
            repeat(None) if self.bases is None else self.bases,
            repeat(self.source),
            repeat(""),
            strict=False,  # `repeat` never ends
        )
        return [*map(partial(tuple.__new__, TensorMatch), rows)]

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[TensorMatch]:
        return iter(self._matches)

    @overload
    def __getitem__(self, index: int) -> TensorMatch: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[TensorMatch]: ...
    def __getitem__(self, index: int | slice) -> TensorMatch | Sequence[TensorMatch]:
        return self._matches[index]


def as_columns(matches: Sequence[TensorMatch]) -> AlikeMatches | None:
    """Matches of one slice, of which none is copied, as columns; None for others."""
    if isinstance(matches, AlikeMatches):
        return matches
    names, slices, positions, operands, bases, sources, copied = zip(*matches, strict=True)
    if any(copied):
        return None
    columns = [*zip(*operands, strict=True)]
    base = None if bases[0] is None else bases
    every = columns if base is None else [base, *columns]
    shapes = [*map(attrgetter("shape"), every[0])]
    dtypes = [[*map(attrgetter("default_dtype"), column)] for column in every]
    return AlikeMatches(slices[0], names, positions, shapes, columns, base, dtypes, sources[0])


@dataclass
class TensorMatches:
    """What matching found.

    Attributes:
        by_slice: the output tensors of each slice.
        integers: tensors that are copied, to be compared with those of the other sources.
        uneven: tensors that not every source has, by what happens to them and why.
    """

    by_slice: list[tuple[OutputSlice, Sequence[TensorMatch]]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    integers: list[Integers] = field(default_factory=list)
    uneven: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    layer_keys: LayerKeys = field(default_factory=LayerKeys)

    @property
    def matches(self) -> list[TensorMatch]:
        """All output tensors."""
        return [match for _, matches in self.by_slice for match in matches]

    def in_layers(self, is_meant: Callable[[LayerPosition], bool]) -> Iterator[TensorMatch]:
        """The output tensors in some layers; the others need not become objects."""
        for _, matches in self.by_slice:
            if isinstance(matches, AlikeMatches):
                positions = [*map(id, matches.layer_positions)]  # few objects, many times
                distinct = dict(zip(positions, matches.layer_positions, strict=True))
                meant = {key for key, position in distinct.items() if is_meant(position)}
                for index, key in enumerate(positions) if meant else ():
                    if key in meant:
                        yield matches[index]
            else:
                yield from (match for match in matches if is_meant(match.layer_position))

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
