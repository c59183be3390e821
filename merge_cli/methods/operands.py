"""Which sources a formula runs over: those that are listed, and where the base stands."""

from __future__ import annotations

from collections.abc import Sequence

from merge_cli.methods.registry import Method
from merge_cli.recipe.schema import Parameters, Recipe, SliceSpec, SourceSpec


def operand_specs(
    recipe: Recipe,
    method: Method,
    specs: Sequence[SourceSpec],
    piece: SliceSpec | None = None,
) -> tuple[SourceSpec, ...]:
    """The sources that the formula runs over, in its order.

    A base among the sources has no task vector, so methods on deltas leave it out; where the base
    is an operand of its own (slerp), it comes first. Methods that average models average an
    unlisted base, too, as mergekit does.

    Args:
        piece: the slice or module that lists the sources, if one does.
    """
    base = recipe.base_model
    if base is None:
        return tuple(specs)
    if averages_base(recipe, method, specs, piece):
        return (*specs, SourceSpec(base, "base_model"))
    own = tuple(s for s in specs if s.model == base)
    others = tuple(s for s in specs if s.model != base)
    if method.base_is_source:
        return (own or (SourceSpec(base, "base_model"),)) + others
    return others if method.needs_base else tuple(specs)


def shared_parameters(recipe: Recipe, piece: SliceSpec | None) -> list[Parameters]:
    """What stands for all sources of a piece, the closest first."""
    own = [piece.parameters, piece.outer] if piece else []
    return [*own, recipe.parameters]


def averages_base(
    recipe: Recipe, method: Method, specs: Sequence[SourceSpec], piece: SliceSpec | None
) -> bool:
    """Whether a base that is not listed counts as one more model."""
    if method.averages_base is None or lists_base(recipe, specs):
        return False
    return method.averages_base(recipe, shared_parameters(recipe, piece))


def lists_base(recipe: Recipe, specs: Sequence[SourceSpec]) -> bool:
    """Whether the base is among the sources, or cannot be: a slice has those that it lists."""
    return any(spec.model == recipe.base_model or spec.layer_range for spec in specs)
