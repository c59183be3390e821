"""Sign election and disjoint mean, which TIES and DARE-TIES share. arXiv:2306.01708."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from merge_cli.kernels.backend import Array, is_numpy, kernels_for, matrix


def disjoint_mean(
    deltas: Sequence[Array],
    weights: Sequence[float],
    *,
    weighted_election: bool,
    divide_by: str,
    zero_sign: float = 1.0,
) -> Array:
    """The mean of each element over the models that agree with its elected sign.

    Args:
        deltas: flat task vectors of equal length, already trimmed or dropped.
        weights: one for each delta.
        weighted_election: elect sign(sum of w_i * d_i), and let w_i * d_i vote; else d_i.
        divide_by: `weights` (sum of agreeing weights; 1 where it is below 1e-8), `count` (number
            of agreeing entries) or `nothing`.
        zero_sign: the sign elected where the sum is exactly 0: 1, -1, or 0 (nothing agrees).
    """
    if is_numpy(deltas[0]):
        return _compiled(deltas, weights, weighted_election, divide_by, zero_sign)
    on_gpu = kernels_for(deltas[0])
    if on_gpu is not None:
        import torch

        stacked = torch.stack(list(deltas))
        return on_gpu.disjoint_mean(stacked, weights, weighted_election, divide_by, zero_sign)
    return _plain(deltas, weights, weighted_election, divide_by, zero_sign)


def _compiled(
    deltas: Sequence[Any], weights: Sequence[float], weighted: bool, divide_by: str, zero: float
) -> Any:
    import numpy as np

    from merge_cli.kernels import compiled

    out = np.empty_like(deltas[0])
    rule = {"nothing": compiled.NOTHING, "weights": compiled.WEIGHTS, "count": compiled.COUNT}
    compiled.disjoint_mean(
        matrix(deltas),
        np.array(weights, out.dtype),
        weighted,
        rule[divide_by],
        np.float32(zero),
        out,
    )
    return out


def _plain(
    deltas: Sequence[Any],
    weights: Sequence[float],
    weighted_election: bool,
    divide_by: str,
    zero_sign: float,
) -> Any:
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
    divisor[divisor.abs() < 1e-8] = 1.0
    return total / divisor
