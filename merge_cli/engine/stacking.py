"""Stacked layers: which pieces of the output the config's lists and counts of layers follow."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from merge_cli.checkpoint.config import (
    PREDICTING,
    layer_count,
    predicting_layers,
    text_config,
    with_layer_types,
)
from merge_cli.checkpoint.source import Source
from merge_cli.engine.layers import LayerKeys, layer_stacks, main_stack
from merge_cli.engine.modules import TEXT, kind_of, members
from merge_cli.engine.pieces import OutputSlice
from merge_cli.engine.structure import Origins
from merge_cli.errors import Problem, RecipeError
from merge_cli.recipe.schema import Recipe


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
        what = f"the layers of '{module}' cannot be added to, left out or moved in this version:"
        hint = "config.json would not say so. List all of them in their order."
        problems.append(recipe.problem(keys[module], what, hint))
    if len(moved) > 1:
        several = [str(own[0].module) for own in moved]
        what = f"config.json counts the layers of one of {', '.join(several)}, not of all."
        problems.append(recipe.problem(keys[several[-1]], what))
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
        found = layer_stacks(source.tensors, places)
        stack = main_stack(source.tensors, source.config, places) or ""
        height, count = found.get(stack, 0), layer_count(source.config)
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
