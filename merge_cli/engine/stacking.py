"""Stacked layers: which pieces of the output the config's lists and counts of layers follow."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from merge_cli.checkpoint.config import with_layer_types
from merge_cli.checkpoint.source import Source
from merge_cli.engine.layers import main_stack, stacks
from merge_cli.engine.modules import TEXT, kind_of, members
from merge_cli.engine.pieces import Piece
from merge_cli.errors import Problem, RecipeError
from merge_cli.recipe.schema import Recipe


def stacked_pieces(
    recipe: Recipe, pieces: Sequence[Piece], sources: Sequence[Source]
) -> list[Piece]:
    """The pieces whose layers are not where they were; none where every layer is.

    Raises:
        RecipeError: layers of a module that config.json does not describe, as far as it is known
            here, are added, left out or moved.
    """
    if not recipe.modules:
        return list(pieces) if recipe.slices else []
    listed = [module.name for module in recipe.modules]
    keys = {module.name: module.key for module in recipe.modules}
    moved: list[list[Piece]] = []
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
        if layers == list(range(stacks(names).get(stack, 0))):
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


def layer_sources(
    pieces: Sequence[Piece], sources: Sequence[Source]
) -> list[tuple[dict[str, object], int]]:
    """For each output layer, whose config describes it and which layer it is there."""
    found: list[tuple[dict[str, object], int]] = []
    for piece in pieces:
        layers = piece.reference.layers
        assert layers is not None, "every source of a slice has a layer_range"
        source = sources[piece.reference.source]
        config = with_layer_types(source.config, source.root)
        found.extend((config, layer) for layer in range(*layers))
    return found
