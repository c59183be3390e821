"""Parameter values as recipes write them: a scalar, a gradient over layers, rules with filters.

A *setting* is what the recipe says; `evaluate` says what it means for one tensor. A gradient is
piecewise linear over the layers of its slice. As in mergekit, tensors that belong to no layer
(embeddings, final norm, lm_head) take a gradient's first value.
"""

from __future__ import annotations

from dataclasses import dataclass

Scalar = float | int | bool | str


@dataclass(frozen=True)
class Gradient:
    """Values at equally spaced anchors over the layers of a slice, first to last."""

    values: tuple[Scalar, ...]


@dataclass(frozen=True)
class Rule:
    """`value` for tensors whose name contains `filter`; None (or `*`) matches every tensor."""

    filter: str | None
    value: Scalar | Gradient


Setting = Scalar | Gradient | tuple[Rule, ...]


@dataclass(frozen=True)
class Parameter:
    """One parameter in a recipe: its setting and the key path where it stands."""

    name: str
    setting: Setting
    key: str


def evaluate(setting: Setting, tensor: str, position: float) -> Scalar | None:
    """The value of a setting for one tensor; None where no rule matches.

    Args:
        tensor: the tensor's name in the output.
        position: its layer's place in the slice, 0 (first, or no layer) to 1 (last).
    """
    if isinstance(setting, tuple):
        for rule in setting:
            if rule.filter is None or rule.filter == "*" or rule.filter in tensor:
                return evaluate(rule.value, tensor, position)
        return None
    if isinstance(setting, Gradient):
        return interpolate(setting.values, position)
    return setting


def filters(setting: Setting) -> set[str]:
    """The parts of names that decide what `evaluate` says of a setting."""
    rules = setting if isinstance(setting, tuple) else ()
    return {rule.filter for rule in rules if rule.filter is not None and rule.filter != "*"}


def is_graded(setting: Setting) -> bool:
    """Whether the layer's position may decide what `evaluate` says of a setting."""
    if isinstance(setting, tuple):
        return any(isinstance(rule.value, Gradient) for rule in setting)
    return isinstance(setting, Gradient)


def interpolate(values: tuple[Scalar, ...], position: float) -> Scalar:
    """Piecewise linear in `position`; booleans and words step instead."""
    place = position * (len(values) - 1)
    if abs(place - round(place)) < 1e-9:  # on an anchor, whatever the division lost
        place = round(place)
    left = min(int(place), len(values) - 1)
    right = min(left + 1, len(values) - 1)
    a, b = values[left], values[right]
    if isinstance(a, bool | str) or isinstance(b, bool | str) or place == left:
        return a
    return a + (b - a) * (place - left)


def scalars(setting: Setting) -> list[Scalar]:
    """Every scalar that a setting can yield at an anchor: what a range check must look at."""
    if isinstance(setting, tuple):
        return [value for rule in setting for value in scalars(rule.value)]
    return list(setting.values) if isinstance(setting, Gradient) else [setting]
