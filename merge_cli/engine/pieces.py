"""The pieces of an output: runs of layers, and which layers of which sources they are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from merge_cli.methods.operands import operand_specs
from merge_cli.methods.registry import Method
from merge_cli.recipe.schema import Recipe, SliceSpec, SourceSpec


@dataclass(frozen=True)
class SliceOperand:
    """One source's part in a piece. The same source may take part twice, with other layers.

    Attributes:
        source: its index among the opened sources.
        place: its place in the recipe, which random masks belong to; -1 for an unlisted base.
        layers: half-open range; None means the whole model.
    """

    source: int
    place: int
    spec: SourceSpec
    layers: tuple[int, int] | None = None


@dataclass(frozen=True)
class OutputSlice:
    """A run of output layers and where they come from.

    Attributes:
        spec: the recipe's slice; None for a merge of whole models.
        operands: in the formula's order.
        first, last: whether tensors before and after the layers come from this piece.
        start: the first output layer.
        module: what its tensors belong to; None means the whole model.
        left_over: it is what no listed module has, copied from its one operand.
    """

    key: str
    spec: SliceSpec | None
    operands: tuple[SliceOperand, ...]
    base: SliceOperand | None
    first: bool = True
    last: bool = True
    start: int = 0
    module: str | None = None
    left_over: bool = False

    @property
    def reference(self) -> SliceOperand:
        """Whose names the piece follows."""
        return self.base or self.operands[0]

    @property
    def members(self) -> tuple[SliceOperand, ...]:
        """Everything that is read, the base first."""
        return (self.base, *self.operands) if self.base else self.operands


def output_slices(recipe: Recipe, method: Method, labels: Sequence[str]) -> list[OutputSlice]:
    """The pieces of the output, in order; one where the recipe has neither slices nor modules.

    Args:
        labels: of the opened sources.
    """
    if not recipe.modules:
        return _cut(recipe, method, labels, recipe.slices or (None,), None)
    pieces = [
        piece
        for module in recipe.modules
        for piece in _cut(recipe, method, labels, module.slices, module.name)
    ]
    donor = recipe.base_model or recipe.source_specs[0].model
    left = SliceOperand(labels.index(str(donor)), -1, SourceSpec(donor, "base_model"))
    return [*pieces, OutputSlice("modules", None, (left,), None, left_over=True)]


def _cut(
    recipe: Recipe,
    method: Method,
    labels: Sequence[str],
    groups: Sequence[SliceSpec | None],
    module: str | None,
) -> list[OutputSlice]:
    """The pieces of a module, or of the whole model."""
    places = {spec.key: place for place, spec in enumerate(recipe.source_specs)}
    pieces: list[OutputSlice] = []
    start = 0
    for number, part in enumerate(groups):
        listed = part.sources if part else recipe.models
        span = listed[0].layer_range
        here = recipe.of_slice(part)

        def operand(spec: SourceSpec, span: tuple[int, int] | None = span) -> SliceOperand:
            # A base that the slice does not list lends the same layers.
            layers = (spec.layer_range or span) if span else None
            return SliceOperand(
                labels.index(str(spec.model)), places.get(spec.key, -1), spec, layers
            )

        base = None
        if method.needs_base and here.base_model is not None:
            own = next((spec for spec in listed if spec.model == here.base_model), None)
            base = operand(own or SourceSpec(here.base_model, "base_model"))
        pieces.append(
            OutputSlice(
                part.key if part else "models",
                part,
                tuple(operand(spec) for spec in operand_specs(here, method, listed, part)),
                base,
                first=number == 0,
                last=number == len(groups) - 1,
                start=start,
                module=module,
            )
        )
        start += span[1] - span[0] if span else 0
    return pieces
