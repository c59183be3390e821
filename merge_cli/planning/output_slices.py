"""Stacked layers: which pieces of the output the config's lists and counts of layers follow.

The pieces of an output: runs of layers, and which layers of which sources they are made of.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from merge_cli.checkpoint.config import (
    PREDICTING,
    layer_count,
    predicting_layers,
    text_config,
    with_layer_types,
)
from merge_cli.errors import Problem, RecipeError
from merge_cli.methods.blocks import operand_specs
from merge_cli.methods.registry import Method
from merge_cli.planning.layers import TEXT, LayerKeys, kind_of, layer_stacks, main_stack, members
from merge_cli.planning.structure import Origins
from merge_cli.recipe.schema import Recipe, SliceSpec, SourceSpec
from merge_cli.sources.source import Source


def stacked_slices(
    recipe: Recipe, pieces: Sequence[OutputSlice], sources: Sequence[Source]
) -> list[OutputSlice]:
    """The pieces whose layers are not where they were; none where every layer is.

    Raises:
        RecipeError: layers of a module that config.json does not describe, as far as it is known
            here, are added, left out or moved.
    """
    if not recipe.modules:
        return list(pieces) if recipe.slices else []
    listed = [module.name for module in recipe.modules]
    keys = {module.name: module.key for module in recipe.modules}
    moved: list[list[OutputSlice]] = []
    problems: list[Problem] = []
    for module, group in groupby(pieces, key=lambda piece: piece.module):
        own = list(group)
        spans = [piece.reference.layers for piece in own if piece.reference.layers]
        if module is None or not spans:
            continue
        source = sources[own[0].reference.source]
        names = members(module, listed, source.tensors)
        stack = main_stack(names, source.config) or ""
        layers = [layer for span in spans for layer in range(*span)]
        if layers == list(range(layer_stacks(names).get(stack, 0))):
            continue
        if kind_of(stack) == TEXT and not source.config.get("is_encoder_decoder"):
            moved.append(own)
            continue
        message = f"the layers of '{module}' cannot be added to, left out or moved in this version:"
        hint = "config.json would not say so. List all of them in their order."
        problems.append(recipe.problem(keys[module], message, hint))
    if len(moved) > 1:
        several = [str(own[0].module) for own in moved]
        message = f"config.json counts the layers of one of {', '.join(several)}, not of all."
        problems.append(recipe.problem(keys[several[-1]], message))
    if problems:
        raise RecipeError(problems)
    return moved[0] if moved else []


def origins_of(
    pieces: Sequence[OutputSlice],
    sources: Sequence[Source],
    places: LayerKeys,
    doubts: Sequence[str],
) -> Origins:
    """Where each output layer comes from.

    Args:
        places: of names that are known already.
        doubts: rules by position that they may not follow; filled later.
    """
    found: list[tuple[Source, int]] = []
    for piece in pieces:
        layers = piece.reference.layers
        assert layers is not None, "every source of a slice has a layer_range"
        found.extend((sources[piece.reference.source], layer) for layer in range(*layers))
    first = sources[pieces[0].reference.source]
    stack = main_stack(first.tensors, first.config, places) or ""
    return Origins(stack, found, doubts)


def described(origins: Origins) -> list[tuple[dict[str, object], int]]:
    """For each output layer, whose config describes it and which layer it is there."""
    configs = {source.label: source for source, _ in origins.layers}
    explicit = {label: with_layer_types(s.config, s.root) for label, s in configs.items()}
    return [(explicit[source.label], layer) for source, layer in origins.layers]


def left_out(
    config: Mapping[str, Any],
    pieces: Sequence[OutputSlice],
    sources: Sequence[Source],
    places: LayerKeys,
) -> tuple[dict[str, Any], list[str]]:
    """Layers behind the last one (for multi-token prediction), which no slice can take.

    Returns:
        the config, which promises none of them any more, and notes.
    """
    changed: dict[str, Any] = json.loads(json.dumps(config))
    part, notes = text_config(changed), []
    for source in {
        sources[piece.reference.source].label: sources[piece.reference.source] for piece in pieces
    }.values():
        result = layer_stacks(source.tensors, places)
        stack = main_stack(source.tensors, source.config, places) or ""
        height, count = result.get(stack, 0), layer_count(source.config)
        behind = predicting_layers(source.config)
        if behind and count is not None and height == count + behind:
            notes.append(
                f"{source.label}: left out {stack}.{count} and what is behind it, which "
                "predicts further tokens and is no layer of the stack"
            )
            for key in PREDICTING:
                if type(part.get(key)) is int:
                    part[key] = 0
    return changed, notes


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
