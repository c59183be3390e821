"""NearSwap: towards another model, but at most by `t` in each element. mergekit's own.

mergekit writes it as w * other + (1-w) * base with w = min(1, t / |other - base|), which is the
base plus the difference cut off at -t and t.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from merge_cli.methods.parameters import Range
from merge_cli.methods.registry import merge_method

if TYPE_CHECKING:
    from torch import Tensor


@merge_method("nearswap", count=(1, 1))
def nearswap(
    base: Tensor, deltas: list[Tensor], *, t: Annotated[float, Range(0.0)] = 0.001
) -> Tensor:
    """Take the other model's value where it is near, and move at most `t` towards it elsewhere.

    Args:
        t: how far an element may move. mergekit has no default.
    """
    return base + deltas[0].clamp(-t, t)
