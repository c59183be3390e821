"""Losses of one token's prediction, over k + 1 bins where a teacher was kept by its top k.

The bins are the teacher's k likeliest tokens and everything else together:

    KL = T² · [ sum of p_k (log p_k - log q_k) + p_tail (log p_tail - log q_tail) ]

with q from the logsumexp over the whole vocabulary. Renormalising the top k instead would call a
student perfect that gives them 2 % of its mass. log q_tail is the logsumexp of what is left, not
log(1 - sum of q_k): the two are equal, and the second one is noise where the tail is small.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
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
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: change(v) for k, v in found.items() if v is not None})


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
        wanted = {name for name, weight in self.weights.items() if weight}
        found: dict[str, Any] = {}
        if wanted & {"kl", "reverse_kl", "mse"}:
            found |= self._against_teacher(logits / self.temperature, targets, wanted)
        if wanted & {"entropy", "cross_entropy"}:
            log_q = logits.log_softmax(-1)
            if "entropy" in wanted:
                found["entropy"] = -(log_q.exp() * log_q).sum(-1)
            if "cross_entropy" in wanted:
                found["cross_entropy"] = -log_q.gather(-1, targets.labels[:, None])[:, 0]
        return found

    def total(self, terms: Mapping[str, Any]) -> Any:
        """The weighted sum [n]."""
        return sum(self.weights[name] * term for name, term in terms.items())

    def _against_teacher(self, z: Any, targets: TeacherTargets, wanted: set[str]) -> dict[str, Any]:
        log_q = z.gather(-1, targets.ids) - z.logsumexp(-1, keepdim=True)
        log_p = targets.logp
        found = {}
        if "mse" in wanted:
            found["mse"] = ((log_q - log_p) ** 2).mean(-1)
        if wanted & {"kl", "reverse_kl"}:
            square = self.temperature**2
            if targets.tail is not None:
                import torch

                rest = z.scatter(-1, targets.ids, float("-inf")).logsumexp(-1) - z.logsumexp(-1)
                log_q = torch.cat([log_q, rest[:, None]], -1)
                log_p = torch.cat([log_p, targets.tail[:, None]], -1)
            if "kl" in wanted:
                found["kl"] = square * (log_p.exp() * (log_p - log_q)).sum(-1)
            if "reverse_kl" in wanted:
                found["reverse_kl"] = square * (log_q.exp() * (log_q - log_p)).sum(-1)
        return found
