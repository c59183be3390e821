"""DELLA: drop at random, the small changes more often than the large ones. arXiv:2406.11617.

Within each row of a task vector the elements are ranked by magnitude; an element of rank r among n
is kept with the chance p = density - epsilon + 2 epsilon r / (n-1), and what is kept is multiplied
by 1/p. Ranks are exact; of equal magnitudes the lower index is the larger. The mask depends on
seed, source, tensor and element alone, as DARE's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from merge_cli.kernels.elect import disjoint_mean
from merge_cli.kernels.mask import random_words
from merge_cli.kernels.reduce import absolute_runs, add_scaled, divided, exact_sum, weighted_sum
from merge_cli.methods.blocks import Span, TensorBlocks, load_whole
from merge_cli.methods.dare import Rescale
from merge_cli.methods.parameters import Density, PerModel, Range, each
from merge_cli.methods.registry import merge_method
from merge_cli.methods.soup import divisor

if TYPE_CHECKING:
    from torch import Tensor

_ONE = 2**32
Epsilon = Annotated[float, Range(0.0, 0.5)]


@dataclass(frozen=True)
class Ranked:
    """How one task vector is dropped.

    Attributes:
        ranks: int32, of each element within its row, 0 for the smallest; None where all are kept,
            or none (density 0).
        last: the largest rank of a row.
        density, epsilon: its parameters.
        factor: of what is kept; None for 1/p of each element.
    """

    ranks: Tensor | None
    last: int
    density: float
    epsilon: float
    factor: float | None

    def dropped(self, delta: Tensor, at: Span, source: int) -> Tensor:
        """A flat span of the task vector with its mask and its rescaling."""
        if self.ranks is None:
            return delta if self.density else delta.new_zeros(len(delta))
        import torch

        ranks = self.ranks[at.start : at.start + len(delta)].to(torch.float64)
        chance = self.density - self.epsilon + 2 * self.epsilon * (ranks / max(self.last, 1))
        if not self.last:
            chance = torch.full_like(chance, self.density)
        drawn = random_words(at.seed, source, at.name, at.start, len(delta), delta.device)
        keep = drawn < (chance * _ONE).round().to(torch.int64)
        scaled = delta / chance.to(delta.dtype) if self.factor is None else delta * self.factor
        return scaled.where(keep, 0.0)


def rank(
    tensor: TensorBlocks,
    survey: None,
    *,
    density: Sequence[float],
    epsilon: Sequence[float],
    rescale: Rescale,
    **_: Any,
) -> list[Ranked]:
    """Ranks of every task vector, which is held whole for it."""
    import torch

    deltas = load_whole(tensor)[1]
    block = next(iter(tensor.blocks()))
    width = tensor.shape[-1] if tensor.shape else 1
    result = []
    for place, (delta, share, spread) in enumerate(zip(deltas, density, epsilon, strict=True)):
        if share >= 1.0 or not share:
            result.append(Ranked(None, 0, share, spread, 1.0))
            continue
        rows = delta.reshape(-1, width).abs()
        largest_first = rows.sort(dim=-1, descending=True, stable=True).indices
        ascending = torch.arange(width - 1, -1, -1, dtype=torch.int32, device=rows.device)
        ranks = torch.empty(rows.shape, dtype=torch.int32, device=rows.device)
        ranks.scatter_(-1, largest_first, ascending.expand_as(ranks))
        plain = Ranked(ranks.reshape(-1), width - 1, share, spread, 1.0)
        factor: float | None = 1.0
        if rescale in ("density", True):
            factor = None
        elif rescale == "l1":
            flat = delta.reshape(-1)
            whole = Span(tensor.name, 0, block.at.seed, block.at.sources)
            kept = plain.dropped(flat, whole, block.at.sources[place])
            before, after = (exact_sum([absolute_runs(x)]) for x in (flat, kept))
            factor = before / after if after else 0.0
        result.append(Ranked(plain.ranks, width - 1, share, spread, factor))
    return result


def _dropped(deltas: list[Tensor], at: Span, ranked: list[Ranked]) -> list[Tensor]:
    return [
        item.dropped(delta, at, source)
        for item, delta, source in zip(ranked, deltas, at.sources, strict=True)
    ]


def chances_fit(density: Sequence[float], epsilon: Sequence[float]) -> str:
    """Why these are no chances; empty when they are."""
    for share, spread in zip(density, epsilon, strict=True):
        if 0.0 < share < 1.0 and not (share - spread >= 0.0 and share + spread <= 1.0):
            message = f"density {share:g} with epsilon {spread:g}: density - epsilon and "
            return message + "density + epsilon must lie in [0, 1]"
    return ""


_SHARED: dict[str, Any] = {
    "paper": "arXiv:2406.11617",
    "prepare": rank,
    "whole": lambda **_: 8,
    "prepare_uses": ("density", "epsilon", "rescale"),
}


@merge_method("della", check=chances_fit, **_SHARED)
def della(
    base: Tensor,
    deltas: list[Tensor],
    at: Span,
    prepared: list[Ranked],
    *,
    weight: PerModel[float] = each(1.0),
    density: PerModel[Density] = each(1.0),
    epsilon: PerModel[Epsilon] = each(0.15),
    rescale: Rescale = "density",
    normalize: bool = True,
    lambda_: float = 1.0,
) -> Tensor:
    """Drop small changes more often than large ones, then elect signs and average what agrees.

    Args:
        weight: how much of each task vector goes in.
        density: the mean chance of an element to be kept; 1 keeps all.
        epsilon: the chance is from density - epsilon (a row's smallest) to density + epsilon.
        rescale: multiply what is kept by 1/chance (`density`, or true), by its L1 norm before over
            after (`l1`, mergekit's rule), or not at all (`none`, or false).
        normalize: divide each element by the sum of the weights that agree.
        lambda_: scale of the whole change.
    """
    mixed = disjoint_mean(
        _dropped(deltas, at, prepared),
        weight,
        weighted_election=True,
        divide_by="weights" if normalize else "nothing",
    )
    mixed_change: Tensor = add_scaled(base, lambda_, mixed)
    return mixed_change


@merge_method("della_linear", check=chances_fit, **_SHARED)
def della_linear(
    base: Tensor,
    deltas: list[Tensor],
    at: Span,
    prepared: list[Ranked],
    *,
    weight: PerModel[float] = each(1.0),
    density: PerModel[Density] = each(1.0),
    epsilon: PerModel[Epsilon] = each(0.15),
    rescale: Rescale = "density",
    normalize: bool = False,
    lambda_: float = 1.0,
) -> Tensor:
    """Drop small changes more often than large ones, rescale the rest, add them to the base.

    Args:
        weight: how much of each task vector goes in.
        density: the mean chance of an element to be kept; 1 keeps all.
        epsilon: the chance is from density - epsilon (a row's smallest) to density + epsilon.
        rescale: multiply what is kept by 1/chance (`density`, or true), by its L1 norm before over
            after (`l1`, mergekit's rule), or not at all (`none`, or false).
        normalize: divide the sum by the sum of the weights, or by 1 where they cancel.
        lambda_: scale of the whole change.
    """
    mixed = weighted_sum(weight, _dropped(deltas, at, prepared))
    if normalize:
        mixed = divided(mixed, divisor(weight))
    changed: Tensor = add_scaled(base, lambda_, mixed)
    return changed
