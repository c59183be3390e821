"""Penalties on coefficients: what is added to the loss, and its gradient, tensor by tensor.

Each is a mean over the coefficients of one tensor (and over pairs of sources); tensors are added
up. θ is the angle of a pair (c_i, c_j): sin² 2θ is 0 where one of the two sources is used alone and
1 where both are used equally.

    cosine             mean over pairs of cos(c_i, c_j)
    l1, l2             mean of |c|, of c²
    overlap            mean over pairs and entries of sin² 2θ = (2 c_i c_j / (c_i² + c_j²))²
    weighted_overlap   the same, each entry weighted by c_i² + c_j²
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

_TINY = 1e-12


def penalty(values: Any, weights: Mapping[str, float]) -> tuple[dict[str, float], Any]:
    """The penalties of one tensor's coefficients, weighted, and the gradient of their sum.

    Args:
        values: [sources, ...].

    Returns:
        penalty -> its weighted value, and d/dvalues (None where there is no penalty).
    """
    import torch

    wanted = {name: weight for name, weight in weights.items() if weight}
    if not wanted:
        return {}, None
    with torch.enable_grad():
        leaf = values.detach().requires_grad_()
        flat = leaf.reshape(len(leaf), -1)
        terms = {name: weight * _PENALTIES[name](flat) for name, weight in wanted.items()}
        total = sum(terms.values())
        if not total.requires_grad:  # one source has no pairs
            return {name: 0.0 for name in terms}, None
        (grad,) = torch.autograd.grad(total, leaf)
    return {name: float(term.detach()) for name, term in terms.items()}, grad


def _cosine(c: Any) -> Any:
    norms = (c * c).sum(1).sqrt().clamp_min(_TINY)
    return _mean([(c[i] * c[j]).sum() / (norms[i] * norms[j]) for i, j in _pairs(c)], c)


def _overlap(c: Any) -> Any:
    return _mean([_sine(c[i], c[j]).mean() for i, j in _pairs(c)], c)


def _weighted_overlap(c: Any) -> Any:
    found = []
    for i, j in _pairs(c):
        weight = c[i] ** 2 + c[j] ** 2
        found.append((weight * _sine(c[i], c[j])).sum() / weight.sum().clamp_min(_TINY))
    return _mean(found, c)


def _sine(a: Any, b: Any) -> Any:
    """sin² of twice the angle of (a, b)."""
    return (2 * a * b / (a * a + b * b).clamp_min(_TINY)) ** 2


def _pairs(c: Any) -> list[tuple[int, int]]:
    return list(combinations(range(len(c)), 2))


def _mean(terms: list[Any], c: Any) -> Any:
    return sum(terms) / len(terms) if terms else c.new_zeros(())


_PENALTIES = {
    "cosine": _cosine,
    "l1": lambda c: c.abs().mean(),
    "l2": lambda c: (c * c).mean(),
    "overlap": _overlap,
    "weighted_overlap": _weighted_overlap,
}
