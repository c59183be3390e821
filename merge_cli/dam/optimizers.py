"""AdamW and MoFO on coefficients, and the learning rate's schedule.

State is in the coefficients' dtype, float32 or wider: with bfloat16 a step of 5e-4 from 1/3 would
be rounded away.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from merge_cli.recipe.training import Training

_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-8


class CoefficientOptimizer:
    """Moves parameters in place; one call for each tensor in each step.

    Attributes:
        state: tensor name -> first and second moments of each of its parameters.
    """

    def __init__(self, training: Training) -> None:
        self.state: dict[str, list[tuple[Any, Any]]] = {}
        self._decay = training.weight_decay
        self._share = training.mofo_fraction if training.optimizer == "mofo" else 1.0

    def moments(self, name: str, parameters: Sequence[Any]) -> list[tuple[Any, Any]]:
        """A tensor's moments; zero before its first step."""
        import torch

        if name not in self.state:
            self.state[name] = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
        return self.state[name]

    def move(
        self, name: str, parameters: Sequence[Any], grads: Sequence[Any], rate: float, step: int
    ) -> None:
        """One step of AdamW (Loshchilov & Hutter, arXiv:1711.05101); `step` counts from 1.

        With MoFO (arXiv:2407.20999) only the share of the largest first moments moves, in each
        tensor of each source; moments are updated everywhere.
        """
        moments = self.moments(name, parameters)
        for parameter, grad, (m, v) in zip(parameters, grads, moments, strict=True):
            m.mul_(_BETA1).add_(grad, alpha=1 - _BETA1)
            v.mul_(_BETA2).addcmul_(grad, grad, value=1 - _BETA2)
            if self._decay:
                parameter.mul_(1 - rate * self._decay)
            first = m / (1 - _BETA1**step)
            second = (v / (1 - _BETA2**step)).sqrt_().add_(_EPSILON)
            change = first.div_(second)
            if self._share < 1:
                change *= largest(m, self._share)
            parameter.sub_(change, alpha=rate)


def largest(momentum: Any, share: float) -> Any:
    """1 for the share of each source's entries with the largest magnitude, 0 for the others.

    At least one entry of each source moves.

    Args:
        momentum: [sources, ...].
    """
    import torch

    flat = momentum.abs().reshape(len(momentum), -1)
    count = max(1, int(share * flat.shape[1]))
    mask = torch.zeros_like(flat)
    mask.scatter_(1, flat.topk(count, 1).indices, 1.0)
    return mask.view_as(momentum)


def rate_at(training: Training, step: int, steps: int) -> float:
    """The learning rate of a step, which counts from 0."""
    warm = round(training.warmup * steps)
    if step < warm:
        return training.learning_rate * (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    factor = {
        "constant": 1.0,
        "linear": 1.0 - done,
        "cosine": 0.5 * (1 + math.cos(math.pi * done)),
    }[training.schedule]
    return training.learning_rate * factor
