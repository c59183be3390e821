"""Task arithmetic: adding task vectors to the base. Ilharco et al., arXiv:2212.04089."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from merge_cli.kernels.backend import Array
from merge_cli.kernels.fused import FusedForm
from merge_cli.kernels.reduce import add_scaled
from merge_cli.methods.consensus import divisor_of, linear_sum
from merge_cli.methods.parameters import PerModel, each
from merge_cli.methods.registry import merge_method


def fused(
    at: Any, prepared: None, *, weight: Sequence[float], normalize: bool, lambda_: float
) -> FusedForm:
    """The formula as one loop."""
    return FusedForm(weight, divisor_of(weight, normalize), lambda_)


@merge_method("task_arithmetic", paper="arXiv:2212.04089", supports_numpy=True, fused=fused)
def task_arithmetic(
    base: Array,
    deltas: list[Array],
    *,
    weight: PerModel[float] = each(1.0),
    normalize: bool = False,
    lambda_: float = 1.0,
) -> Array:
    """Add weighted task vectors to the base: theta_0 + lambda * sum of w_i * delta_i.

    Args:
        weight: how much of each task vector goes in.
        normalize: divide the sum by the sum of the weights, or by 1 where they cancel.
        lambda_: scale of the whole change.
    """
    change = linear_sum(weight, deltas, divisor_of(weight, normalize))
    return add_scaled(base, lambda_, change)
