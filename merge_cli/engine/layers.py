"""Where a tensor stands in its model: found in its name, so that any architecture will do.

The first number in a name is its layer: `model.layers.7.mlp.up_proj.weight` is layer 7 of the
stack `model.layers`. A model may have several stacks (encoder and decoder, vision and text); the
one that recipes slice is the one with as many layers as the config says.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from merge_cli.checkpoint.config import layer_count

_LAYER = re.compile(r"^(?:(?P<stack>.*?)\.)?(?P<index>\d+)\.(?P<rest>.+)$")
# After the last layer: they come from the last slice. What else has no layer comes from the first.
_AFTER = re.compile(r"(norm|ln_f|final_layernorm|final_layer_norm|final_norm|lm_head|"
                    r"embed_out|output|score|classifier|pooler|cls|ln_out)(\.|$)")  # fmt: skip


@dataclass(frozen=True)
class Place:
    """A layer of a stack and the rest of the name."""

    stack: str
    index: int
    rest: str

    def name(self, index: int) -> str:
        """The same tensor's name in another layer."""
        return ".".join(part for part in (self.stack, str(index), self.rest) if part)


def place_of(name: str) -> Place | None:
    """The layer that a tensor belongs to, or None."""
    match = _LAYER.match(name)
    return Place(match["stack"] or "", int(match["index"]), match["rest"]) if match else None


def stacks(names: Iterable[str]) -> dict[str, int]:
    """Every stack and its number of layers."""
    found: dict[str, int] = {}
    for name in names:
        place = place_of(name)
        if place:
            found[place.stack] = max(found.get(place.stack, 0), place.index + 1)
    return found


def comes_after_layers(name: str, stack: str) -> bool:
    """Whether a tensor without a layer belongs behind a stack (final norm, lm_head).

    It must stand beside the stack or beside one of its parents: the norm of a projector or of
    another module belongs to that module.
    """
    parents = stack.split(".")[:-1]
    for depth in range(len(parents), -1, -1):
        parent = "".join(f"{part}." for part in parents[:depth])
        if name.startswith(parent) and _AFTER.match(name[len(parent) :]):
            return True
    return False


def main_stack(names: Iterable[str], config: Mapping[str, Any]) -> str | None:
    """The stack that `layer_range` counts in; None where it is not clear which."""
    found = stacks(names)
    count = layer_count(config)
    fitting = [stack for stack, layers in found.items() if layers == count]
    if len(fitting) == 1:
        return fitting[0]
    if not fitting and len(found) == 1:
        return next(iter(found))
    return None
