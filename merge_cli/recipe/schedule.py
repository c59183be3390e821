"""The `schedule:` of a window: which learning-rate decay an average of checkpoints stands for.

WSM (arXiv:2507.17634): a run at a constant learning rate has checkpoints θ_0 ... θ_k, and g_i is
what training added from one to the next, θ_i = θ_{i-1} + g_i. An average of them with weights c_j
is then a run that took each g_i with the factor w_i:

    sum of c_j * θ_j = θ_0 + sum of w_i * g_i        w_i = sum of c_j over j >= i

Read backwards, a decay 1 >= w_1 >= ... >= w_k >= 0 gives the weights of the checkpoints:

    c_j = w_j - w_{j+1}                              c_0 = 1 - w_1,  c_k = w_k

A decay is a curve f that falls from f(0) = 1 to f(1) = 0, and w_i = f(i / (k + 1)): each of the
k + 1 checkpoints has the part of the fall that is its own. So `linear` is the plain mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from merge_cli.errors import UsageError
from merge_cli.recipe.fields import nearest
from merge_cli.recipe.forms import NUMBER_AS_TEXT, any_of, finite
from merge_cli.recipe.nodes import Node
from merge_cli.recipe.reader import REFUSED, Form, Reader, Schema

# f of the fraction of the window that has passed; Megatron-LM calls the last one so, too.
CURVES: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "minus_sqrt": lambda x: 1 - math.sqrt(x),
}
CONSTANT, EMA, WEIGHTS = "constant", "ema", "weights"
_WORDS = (CONSTANT, *CURVES)


@dataclass(frozen=True)
class Schedule:
    """How much each checkpoint of a window counts.

    Attributes:
        name: constant, the name of a curve, ema, or weights.
        decay: of `ema`: what the average keeps of itself when a checkpoint comes; in (0, 1).
        given: of `weights`: one for each checkpoint, the oldest first.
    """

    name: str = CONSTANT
    decay: float = 0.0
    given: tuple[float, ...] = ()

    def __str__(self) -> str:
        return f"{self.name} {self.decay:g}" if self.name == EMA else self.name

    def weights(self, count: int) -> tuple[float, ...]:
        """The weights c_0 ... c_k of `count` = k + 1 checkpoints, the oldest first.

            constant     1 for each; a soup divides by their sum, so that this is the mean
            a curve      c_j = f(j / (k + 1)) - f((j + 1) / (k + 1)); the sum is 1
            ema          c_0 = d^k and c_j = (1 - d) * d^(k - j): the exponential moving average
                         a_j = d * a_{j-1} + (1 - d) * θ_j that begins with θ_0; the sum is 1
            weights      as given

        Raises:
            ValueError: other than `count` weights are given.
        """
        if self.name == WEIGHTS:
            if len(self.given) != count:
                raise ValueError(f"{len(self.given)} weights for {count} checkpoints")
            return self.given
        if self.name == CONSTANT:
            return (1.0,) * count
        if self.name == EMA:
            keep, last = self.decay, count - 1
            newer = (float((1 - keep) * keep ** (last - j)) for j in range(1, count))
            return (keep**last, *newer)
        curve = CURVES[self.name]
        decay = [curve(i / count) for i in range(count)] + [0.0]
        return tuple(now - after for now, after in pairwise(decay))

    @property
    def decays(self) -> bool:
        """Whether it follows a curve, which takes checkpoints to be equally far apart."""
        return self.name in CURVES or self.name == EMA


@dataclass(frozen=True)
class ScheduleForm(Form):
    """A word, `{ema: decay}` or `{weights: [...]}`."""

    def read(self, node: Node, key: str, reader: Reader) -> Any:
        value = node.value
        if isinstance(value, str):
            return self._word(node, value, key, reader)
        if not isinstance(value, dict) or len(value) != 1:
            allowed = f"one of {', '.join(_WORDS)}, or {{ema: DECAY}}, or {{weights: [...]}}"
            return reader.refuse_type(node, key, f"must be {allowed}")
        ((name, child),) = value.items()
        path = f"{key}.{name}"
        reader.positions[path] = node.key_positions[name]
        if name == EMA:
            decay = finite(child.value)
            if decay is None or not 0 < decay < 1:
                return reader.refuse_type(child, path, "must be a number between 0 and 1")
            return Schedule(EMA, decay)
        if name == WEIGHTS:
            listed = child.value if isinstance(child.value, list) else []
            numbers = [finite(item.value) for item in listed]
            given = tuple(number for number in numbers if number is not None)
            if not numbers or len(given) < len(numbers):
                return reader.refuse_type(child, path, "must be a list of numbers")
            return Schedule(WEIGHTS, given=given)
        reader.refuse_key(path, "unknown schedule.", nearest(name, (EMA, WEIGHTS)))
        return REFUSED

    def _word(self, node: Node, word: str, key: str, reader: Reader) -> Any:
        if word in _WORDS:
            return Schedule(word)
        if word in (EMA, WEIGHTS):
            example = "{ema: 0.9}" if word == EMA else "{weights: [1, 2, 3]}"
            return reader.refuse(node, key, f"'{word}' needs more.", f"Write {example}.")
        message = f"unknown schedule '{word}'."
        return reader.refuse(node, key, message, nearest(word, (*_WORDS, EMA, WEIGHTS)))

    def schema(self) -> Schema:
        number = any_of({"type": "number"}, NUMBER_AS_TEXT)
        kept = {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}
        decay = {
            **any_of(kept, NUMBER_AS_TEXT),
            "description": "what the moving average keeps of itself at each checkpoint",
        }
        weights: Schema = {
            "type": "array",
            "items": number,
            "minItems": 1,
            "description": "one for each checkpoint, the oldest first; a soup's, so relative",
        }
        alone: Schema = {"type": "object", "additionalProperties": False}
        return any_of(
            {"enum": list(_WORDS)},
            {**alone, "properties": {EMA: decay}, "required": [EMA]},
            {**alone, "properties": {WEIGHTS: weights}, "required": [WEIGHTS]},
        )


SCHEDULE = ScheduleForm()


def checkpoint_weights(schedule: str, count: int, *, decay: float | None = None) -> list[float]:
    """The weights of `count` checkpoints, the oldest first, as `checkpoint_average` has them.

    Args:
        schedule: constant, linear, cosine, minus_sqrt or ema (arXiv:2507.17634; the module's text
            has the formulas).
        count: how many checkpoints, at least 1.
        decay: of ema, in (0, 1).

    Raises:
        UsageError: an unknown schedule, a decay that is missing or has no use, no checkpoints.
    """
    if schedule not in (*_WORDS, EMA):
        raise UsageError(f"unknown schedule '{schedule}'", hint=nearest(schedule, (*_WORDS, EMA)))
    if (schedule == EMA) != (decay is not None):
        raise UsageError("ema, and no other schedule, has a decay", where=f"decay={decay}")
    if decay is not None and not 0 < decay < 1:
        raise UsageError(f"the decay must be between 0 and 1 (got {decay})")
    if count < 1:
        raise UsageError("there are no checkpoints", where=f"count={count}")
    return [*Schedule(schedule, decay or 0.0).weights(count)]
