"""Sign election and disjoint mean, the consensus of TIES. arXiv:2306.01708."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from merge_cli.kernels.backend import Array, matrix, primitive

# The sum of the agreeing weights, the number of agreeing entries, or no division.
DivideBy = Literal["weights", "count", "nothing"]


@primitive()
def disjoint_mean(
    deltas: Sequence[Array],
    weights: Sequence[float],
    *,
    weighted_election: bool,
    divide_by: DivideBy,
    zero_sign: float = 1.0,
    least_divisor: float | None = None,
) -> Array:
    """The mean of each element over the models that agree with its elected sign.

    Args:
        deltas: flat task vectors of equal length, already trimmed or dropped.
        weights: one for each delta.
        weighted_election: elect sign(sum of w_i * d_i), and let w_i * d_i vote; else d_i.
        divide_by: `weights` (1 where the sum is below 1e-8), `count` or `nothing`.
        zero_sign: the sign elected where the sum is exactly 0: 1, -1, or 0 (nothing agrees).
        least_divisor: divide by this where the divisor is smaller, instead of by 1.
    """
    import torch

    weighted = [d * w for d, w in zip(deltas, weights, strict=True)]
    voters = weighted if weighted_election else deltas
    elected = voters[0].clone()
    for voter in voters[1:]:
        elected += voter
    elected.sign_()
    elected[elected == 0] = zero_sign
    total = torch.zeros_like(elected)
    divisor = torch.zeros_like(elected)
    for voter, value, weight in zip(voters, weighted, weights, strict=True):
        agrees = (voter * elected) > 0  # an entry that is 0 has no sign and never agrees
        total += value.where(agrees, 0.0)
        if divide_by != "nothing":
            share = weight if divide_by == "weights" else 1.0
            divisor += agrees.to(divisor.dtype) * share
    if divide_by == "nothing":
        return total
    if least_divisor is not None:
        return total / divisor.clamp(min=least_divisor)
    divisor[divisor.abs() < 1e-8] = 1.0
    return total / divisor


@disjoint_mean.compiled
def _disjoint_mean_compiled(
    deltas: Sequence[Array],
    weights: Sequence[float],
    *,
    weighted_election: bool,
    divide_by: DivideBy,
    zero_sign: float = 1.0,
    least_divisor: float | None = None,
) -> Array:
    import numpy as np

    from merge_cli.kernels import compiled

    out = np.empty_like(deltas[0])
    rule = {"nothing": compiled.NOTHING, "weights": compiled.WEIGHTS, "count": compiled.COUNT}
    compiled.disjoint_mean(
        matrix(deltas),
        np.array(weights, out.dtype),
        weighted_election,
        rule[divide_by],
        np.float32(zero_sign),
        np.float32(least_divisor or 0.0),
        out,
    )
    return out


@disjoint_mean.triton
def _disjoint_mean_triton(
    deltas: Sequence[Array],
    weights: Sequence[float],
    *,
    weighted_election: bool,
    divide_by: DivideBy,
    zero_sign: float = 1.0,
    least_divisor: float | None = None,
) -> Array:
    if least_divisor is not None:  # SCE alone: not worth a kernel of its own
        return disjoint_mean.reference(
            deltas,
            weights,
            weighted_election=weighted_election,
            divide_by=divide_by,
            zero_sign=zero_sign,
            least_divisor=least_divisor,
        )
    import torch

    from merge_cli.kernels import triton_kernels

    stacked = torch.stack(list(deltas))
    return triton_kernels.disjoint_mean(stacked, weights, weighted_election, divide_by, zero_sign)
