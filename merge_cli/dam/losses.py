"""Losses of one token's prediction, over k + 1 bins where a teacher was kept by its top k.

The bins are the teacher's k likeliest tokens and everything else together:

    KL = T² · [ sum of p_k (log p_k - log q_k) + p_tail (log p_tail - log q_tail) ]

with q from the logsumexp over the whole vocabulary. Renormalising the top k instead would call a
student perfect that gives them 2 % of its mass. log q_tail is the logsumexp of what is left, not
log(1 - sum of q_k): the two are equal, and the second one is noise where the tail is small.

Penalties on coefficients: what is added to the loss, and its gradient, tensor by tensor.

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
from dataclasses import dataclass, fields, replace
from itertools import combinations
from typing import Any


@dataclass(frozen=True)
class TeacherTargets:
    """What n tokens should be predicted as.

    Attributes:
        labels: int64 [n], the tokens that came.
        weights: [n], what each token's loss counts.
        ids: int64 [n, k], the teacher's likeliest tokens; None where no teacher is asked.
        logp: [n, k], their log-probabilities at the teacher's temperature.
        tail: [n], log-probability of all others; None where k is the whole vocabulary.
        owners: int64 [n], the number of each token's data set, for the report.
    """

    labels: Any
    weights: Any
    ids: Any = None
    logp: Any = None
    tail: Any = None
    owners: Any = None

    def part(self, start: int, stop: int) -> TeacherTargets:
        """Some of the tokens."""
        return self._each(lambda value: value[start:stop])

    def to(self, device: Any, dtype: Any) -> TeacherTargets:
        """On the student's device, probabilities in the dtype that losses are computed in."""
        return self._each(
            lambda value: value.to(device, dtype if value.is_floating_point() else None)
        )

    def _each(self, change: Any) -> TeacherTargets:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: change(v) for k, v in values.items() if v is not None})


@dataclass(frozen=True)
class DistillationLoss:
    """Losses with their weights, and the temperature of those that compare with a teacher."""

    weights: Mapping[str, float]
    temperature: float = 1.0

    def terms(self, logits: Any, targets: TeacherTargets) -> dict[str, Any]:
        """Each loss [n], not yet weighted.

        Args:
            logits: [n, vocabulary], float32 or float64.
        """
        requested = {name for name, weight in self.weights.items() if weight}
        result: dict[str, Any] = {}
        if requested & {"kl", "reverse_kl", "mse"}:
            z = logits if self.temperature == 1 else logits / self.temperature
            result |= self._against_teacher(z, targets, requested)
        if requested & {"entropy", "cross_entropy"}:
            log_q = logits.log_softmax(-1)
            if "entropy" in requested:
                result["entropy"] = -(log_q.exp() * log_q).sum(-1)
            if "cross_entropy" in requested:
                result["cross_entropy"] = -log_q.gather(-1, targets.labels[:, None])[:, 0]
        return result

    def total(self, terms: Mapping[str, Any]) -> Any:
        """The weighted sum [n]."""
        return sum(self.weights[name] * term for name, term in terms.items())

    def _against_teacher(
        self, z: Any, targets: TeacherTargets, requested: set[str]
    ) -> dict[str, Any]:
        normaliser = z.logsumexp(-1, keepdim=True)
        log_q = z.gather(-1, targets.ids) - normaliser
        log_p = targets.logp
        result = {}
        if "mse" in requested:
            result["mse"] = ((log_q - log_p) ** 2).mean(-1)
        if requested & {"kl", "reverse_kl"}:
            square = self.temperature**2
            if targets.tail is not None:
                import torch

                others = z.scatter(-1, targets.ids, float("-inf"))
                log_q = torch.cat([log_q, others.logsumexp(-1, keepdim=True) - normaliser], -1)
                log_p = torch.cat([log_p, targets.tail[:, None]], -1)
            if "kl" in requested:
                result["kl"] = square * (log_p.exp() * (log_p - log_q)).sum(-1)
            if "reverse_kl" in requested:
                result["reverse_kl"] = square * (log_q.exp() * (log_q - log_p)).sum(-1)
        return result


_TINY = 1e-12


def penalty(values: Any, weights: Mapping[str, float]) -> tuple[dict[str, float], Any]:
    """The penalties of one tensor's coefficients, weighted, and the gradient of their sum.

    Args:
        values: [sources, ...].

    Returns:
        penalty -> its weighted value, and d/dvalues (None where there is no penalty).
    """
    import torch

    requested = {name: weight for name, weight in weights.items() if weight}
    if not requested:
        return {}, None
    with torch.enable_grad():
        leaf = values.detach().requires_grad_()
        flat = leaf.reshape(len(leaf), -1)
        terms = {name: weight * _PENALTIES[name](flat) for name, weight in requested.items()}
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
    terms = []
    for i, j in _pairs(c):
        weight = c[i] ** 2 + c[j] ** 2
        terms.append((weight * _sine(c[i], c[j])).sum() / weight.sum().clamp_min(_TINY))
    return _mean(terms, c)


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
