"""The slices of the output: runs of layers, and the layers of the sources that they are made of.

A recipe without `slices:` or `modules:` has one slice, the whole model. Where slices move layers,
the lists and counts of layers in config.json have to follow (`stacked_slices`, `origins_of`).
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
from merge_cli.methods.method import Method
from merge_cli.planning.layers import TEXT, LayerKeys, kind_of, layer_stacks, main_stack, members
from merge_cli.planning.stacked_kinds import Origins
from merge_cli.recipe.schema import Recipe, SliceSpec, SourceSpec
from merge_cli.sources.source import Source


@dataclass(frozen=True)
class SliceOperand:
    """One source's part in a slice. The same source may take part twice, with other layers.

    Attributes:
        source: its index among the opened sources.
        recipe_index: its number in the recipe, which random masks depend on; -1: unlisted base.
        layers: half-open range; None means the whole model.
    """

    source: int
    recipe_index: int
    spec: SourceSpec
    layers: tuple[int, int] | None = None


@dataclass(frozen=True)
class OutputSlice:
    """A run of output layers and where they come from.

    Attributes:
        spec: the recipe's slice; None for a merge of whole models.
        operands: in the formula's order.
        first, last: whether tensors before and after the layers come from this slice.
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
        """Whose names the slice follows."""
        return self.base or self.operands[0]

    @property
    def members(self) -> tuple[SliceOperand, ...]:
        """Everything that is read, the base first."""
        return (self.base, *self.operands) if self.base else self.operands


def output_slices(recipe: Recipe, method: Method, labels: Sequence[str]) -> list[OutputSlice]:
    """The slices of the output, in order; one where the recipe has neither slices nor modules.

    Args:
        labels: of the opened sources.
    """
    if not recipe.modules:
        return _cut(recipe, method, labels, recipe.slices or (None,), None)
    slices = [
        output_slice
        for module in recipe.modules
        for output_slice in _cut(recipe, method, labels, module.slices, module.name)
    ]
    rest_source = recipe.base_model or recipe.source_specs[0].model
    rest = SliceOperand(labels.index(str(rest_source)), -1, SourceSpec(rest_source, "base_model"))
    return [*slices, OutputSlice("modules", None, (rest,), None, left_over=True)]


def _cut(
    recipe: Recipe,
    method: Method,
    labels: Sequence[str],
    groups: Sequence[SliceSpec | None],
    module: str | None,
) -> list[OutputSlice]:
    """The slices of a module, or of the whole model."""
    recipe_index = {spec.key: index for index, spec in enumerate(recipe.source_specs)}
    slices: list[OutputSlice] = []
    start = 0
    for number, part in enumerate(groups):
        listed = part.sources if part else recipe.models
        span = listed[0].layer_range
        slice_recipe = recipe.of_slice(part)

        def operand(spec: SourceSpec, span: tuple[int, int] | None = span) -> SliceOperand:
            # A base that the slice does not list lends the same layers.
            layers = (spec.layer_range or span) if span else None
            return SliceOperand(
                labels.index(str(spec.model)), recipe_index.get(spec.key, -1), spec, layers
            )

        base = None
        if method.needs_base and slice_recipe.base_model is not None:
            listed_base = next(
                (spec for spec in listed if spec.model == slice_recipe.base_model), None
            )
            base = operand(listed_base or SourceSpec(slice_recipe.base_model, "base_model"))
        slices.append(
            OutputSlice(
                part.key if part else "models",
                part,
                tuple(operand(spec) for spec in operand_specs(slice_recipe, method, listed, part)),
                base,
                first=number == 0,
                last=number == len(groups) - 1,
                start=start,
                module=module,
            )
        )
        start += span[1] - span[0] if span else 0
    return slices


def stacked_slices(
    recipe: Recipe, slices: Sequence[OutputSlice], sources: Sequence[Source]
) -> list[OutputSlice]:
    """The slices whose layers are not where they were; none where every layer is.

    Raises:
        RecipeError: layers of a module that config.json does not describe, as far as it is known
            here, are added, left out or moved.
    """
    if not recipe.modules:
        return list(slices) if recipe.slices else []
    listed = [module.name for module in recipe.modules]
    keys = {module.name: module.key for module in recipe.modules}
    moved: list[list[OutputSlice]] = []
    problems: list[Problem] = []
    for module, group in groupby(slices, key=lambda output_slice: output_slice.module):
        module_slices = list(group)
        spans = [
            output_slice.reference.layers
            for output_slice in module_slices
            if output_slice.reference.layers
        ]
        if module is None or not spans:
            continue
        source = sources[module_slices[0].reference.source]
        names = members(module, listed, source.tensors)
        stack = main_stack(names, source.config) or ""
        layers = [layer for span in spans for layer in range(*span)]
        if layers == list(range(layer_stacks(names).get(stack, 0))):
            continue
        if kind_of(stack) == TEXT and not source.config.get("is_encoder_decoder"):
            moved.append(module_slices)
            continue
        message = f"the layers of '{module}' cannot be added to, left out or moved"
        hint = "config.json would still count them as they were. List all of them in their order."
        problems.append(recipe.problem(keys[module], message, hint))
    if len(moved) > 1:
        several = [str(module_slices[0].module) for module_slices in moved]
        message = f"config.json counts the layers of one of {', '.join(several)}, not of all."
        problems.append(recipe.problem(keys[several[-1]], message))
    if problems:
        raise RecipeError(problems)
    return moved[0] if moved else []


def origins_of(
    slices: Sequence[OutputSlice],
    sources: Sequence[Source],
    layer_keys: LayerKeys,
    doubts: Sequence[str],
) -> Origins:
    """Where each output layer comes from.

    Args:
        layer_keys: of names that were looked up before.
        doubts: rules by position that they may not follow; filled later.
    """
    layers_from: list[tuple[Source, int]] = []
    for output_slice in slices:
        layers = output_slice.reference.layers
        assert layers is not None, "every source of a slice has a layer_range"
        layers_from.extend(
            (sources[output_slice.reference.source], layer) for layer in range(*layers)
        )
    first = sources[slices[0].reference.source]
    stack = main_stack(first.tensors, first.config, layer_keys) or ""
    return Origins(stack, layers_from, doubts)


def described(origins: Origins) -> list[tuple[dict[str, object], int]]:
    """For each output layer, whose config describes it and which layer it is there."""
    configs = {source.label: source for source, _ in origins.layers}
    explicit = {label: with_layer_types(s.config, s.root) for label, s in configs.items()}
    return [(explicit[source.label], layer) for source, layer in origins.layers]


def left_out(
    config: Mapping[str, Any],
    slices: Sequence[OutputSlice],
    sources: Sequence[Source],
    layer_keys: LayerKeys,
) -> tuple[dict[str, Any], list[str]]:
    """Layers behind the last one (for multi-token prediction), which no slice can take.

    Returns:
        the config, which promises none of them any more, and notes.
    """
    changed: dict[str, Any] = json.loads(json.dumps(config))
    part, notes = text_config(changed), []
    for source in {
        sources[output_slice.reference.source].label: sources[output_slice.reference.source]
        for output_slice in slices
    }.values():
        stacks = layer_stacks(source.tensors, layer_keys)
        stack = main_stack(source.tensors, source.config, layer_keys) or ""
        layers, count = stacks.get(stack, 0), layer_count(source.config)
        predicting = predicting_layers(source.config)
        if predicting and count is not None and layers == count + predicting:
            notes.append(
                f"{source.label}: left out {stack}.{count} and what is behind it, which "
                "predicts further tokens and is no layer of the stack"
            )
            for key in PREDICTING:
                if type(part.get(key)) is int:
                    part[key] = 0
    return changed, notes
