"""Arcee Fusion: take another model's weights only where they matter most. mergekit's own.

An element's importance is |change| times the divergence of its row: KL(softmax of the other's row ‖
softmax of the base's row). The other's elements are taken where that is at least the median and one
and a half interquartile ranges, over the tensor. mergekit samples the quartiles of large tensors at
random; here they are exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from merge_cli.methods.blocks import Span, TensorBlocks, load_whole
from merge_cli.methods.registry import merge_method

if TYPE_CHECKING:
    from torch import Tensor

_QUARTILES = (0.25, 0.5, 0.75)
_RANGES = 1.5
_SMALL = 1e-8  # added to probabilities, as in mergekit
_ROWS = 256  # whose softmax is held at once


@dataclass(frozen=True)
class Importance:
    """What decides for a tensor: each row's divergence, the row's length, the threshold."""

    rows: Tensor
    width: int
    threshold: float

    def of(self, delta: Tensor, start: int) -> Tensor:
        """The importance of a flat span's elements."""
        import torch

        elements = torch.arange(start, start + len(delta), device=delta.device)
        return delta.abs() * self.rows[elements // self.width]


def measure(tensor: TensorBlocks, model: None, **_: Any) -> Importance:
    """Divergences and the threshold; the tensor is held whole."""
    import torch

    base, (delta,) = load_whole(tensor)
    assert base is not None, "the method asks for the base"
    width = tensor.shape[-1] if tensor.shape else 1
    base, delta = base.reshape(-1, width), delta.reshape(-1, width)
    divergences = []
    for begin in range(0, len(base), _ROWS):
        q = base[begin : begin + _ROWS].double()
        p = (q + delta[begin : begin + _ROWS].double()).softmax(-1) + _SMALL
        q = q.softmax(-1) + _SMALL
        divergences.append((p * (p / q).log()).sum(-1).to(base.dtype))
    rows = torch.cat(divergences)
    ordered = Importance(rows, width, 0.0).of(delta.reshape(-1), 0).sort().values
    low, middle, high = (float(ordered[int(q * (len(ordered) - 1))]) for q in _QUARTILES)
    return Importance(rows, width, middle + _RANGES * (high - low))


@merge_method("arcee_fusion", count=(1, 1), tensor_pass=measure, extra_memory=lambda **_: 4)
def arcee_fusion(base: Tensor, deltas: list[Tensor], at: Span, prepared: Importance) -> Tensor:
    """Take the other model's elements where change and divergence together stand out."""
    (delta,) = deltas
    chosen = prepared.of(delta, at.start) >= prepared.threshold
    return base + delta.where(chosen, 0.0)
