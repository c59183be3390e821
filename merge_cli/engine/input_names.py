"""What a tensor of the output is called in its sources, which filters of slices look at."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from merge_cli.engine.layers import layer_key_of
from merge_cli.engine.match import TensorMatch


def input_names(match: TensorMatch) -> tuple[str, ...]:
    """The tensor's name in each operand's model, by that model's own layer numbers."""
    operands, layer = match.piece.operands, match.seat.layer
    place = layer_key_of(match.name) if layer is not None else None
    if place is None or layer is None:
        return (match.name,) * len(operands)
    return tuple(place.name((one.layers or (0, 0))[0] + layer) for one in operands)


def sliced_names(matches: Iterable[TensorMatch]) -> Iterator[str]:
    """The names that tensors of slices have in their sources: filters look at those, too."""
    for match in matches:
        if match.seat.layer is not None:
            yield from input_names(match)
