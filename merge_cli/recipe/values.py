"""Parameter values as recipes write them: a scalar, a gradient over layers, rules with filters.

A *setting* is what the recipe says; `evaluate` says what it means for one tensor. A gradient is
piecewise linear over the layers of its slice. As in mergekit, tensors that belong to no layer
(embeddings, final norm, lm_head) take a gradient's first value.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from merge_cli.errors import Problem, RecipeError
from merge_cli.recipe.other_names import other_names
from merge_cli.system.patterns import Pattern, compile_pattern
from merge_cli.system.untrusted import Unreadable

Scalar = float | int | bool | str


@dataclass(frozen=True)
class Gradient:
    """Values at equally spaced anchors over the layers of a slice, first to last."""

    values: tuple[Scalar, ...]


@dataclass(frozen=True)
class Rule:
    """`value` for tensors that `filter` matches; None (or `*`) matches every tensor."""

    filter: str | None
    value: Scalar | Gradient


Setting = Scalar | Gradient | tuple[Rule, ...]


@dataclass(frozen=True)
class Parameter:
    """One parameter in a recipe: its setting and the key path where it stands."""

    name: str
    setting: Setting
    key: str


def evaluate(
    setting: Setting,
    tensor: str,
    position: float,
    read: Callable[[Scalar], Scalar] = lambda value: value,
) -> Scalar | None:
    """The value of a setting for one tensor; None where no rule matches.

    Args:
        tensor: the name that filters look at.
        position: its layer's place in the slice, 0 (first, or no layer) to 1 (last).
        read: what a scalar means, before a gradient is interpolated.
    """
    if isinstance(setting, tuple):
        for rule in setting:
            if rule.filter is None or rule.filter == "*" or matches(rule.filter, tensor):
                return evaluate(rule.value, tensor, position, read)
        return None
    if isinstance(setting, Gradient):
        return interpolate(tuple(map(read, setting.values)), position)
    return read(setting)


def matches(filter: str, tensor: str) -> bool:
    """Whether a filter means a tensor.

    A part of its name, as in mergekit; `/.../` is a regular expression that occurs in it; what has
    `*` or `?`, which no name has, must match the whole of it, as in a shell. A tensor of a mixture
    goes by more than one name (`other_names`), and one of them is enough.
    """
    pattern = _pattern(filter)
    names = (tensor, *other_names(tensor))
    if pattern is None:
        return any(filter in name for name in names)
    try:
        return any(pattern.search(name) is not None for name in names)
    except Unreadable as error:
        raise RecipeError([Problem(f"the filter {filter[:60]!r} {error}")]) from None


def filter_error(filter: str) -> str:
    """Why a filter can mean no tensor; empty when it can."""
    try:
        if _is_expression(filter):
            re.compile(filter[1:-1])
        pattern = _pattern(filter)
        if pattern is not None:
            pattern.search("model.layers.0.self_attn.q_proj.weight")  # whether it can be bounded
    except re.error as error:
        at = "" if error.pos is None else f", at character {error.pos + 2} of the filter"
        return f"not a regular expression: {error.msg}{at}"
    except RecursionError:
        return "not a regular expression: it nests too deep"
    except (Unreadable, OverflowError) as error:
        return str(error).removeprefix("is ")
    return ""


def _is_expression(filter: str) -> bool:
    return len(filter) > 2 and filter.startswith("/") and filter.endswith("/")


@lru_cache(maxsize=256)
def _pattern(filter: str) -> Pattern | re.Pattern[str] | None:
    if _is_expression(filter):
        return compile_pattern(filter[1:-1])
    if "*" in filter or "?" in filter:
        return re.compile(rf"\A{fnmatch.translate(filter)}")  # which never explodes
    return None


def covers(rule: Rule, later: Rule) -> bool:
    """Whether a rule matches every tensor that a later one could match, as far as names tell."""
    if rule.filter in (None, "*"):
        return True
    if later.filter in (None, "*"):
        return False
    assert rule.filter is not None
    assert later.filter is not None
    return rule.filter == later.filter or (
        _pattern(rule.filter) is None
        and _pattern(later.filter) is None
        and rule.filter in later.filter
    )


def filters(setting: Setting) -> set[str]:
    """The filters that decide what `evaluate` says of a setting."""
    rules = setting if isinstance(setting, tuple) else ()
    return {rule.filter for rule in rules if rule.filter is not None and rule.filter != "*"}


def is_graded(setting: Setting) -> bool:
    """Whether the layer's position may decide what `evaluate` says of a setting."""
    if isinstance(setting, tuple):
        return any(isinstance(rule.value, Gradient) for rule in setting)
    return isinstance(setting, Gradient)


def interpolate(values: tuple[Scalar, ...], position: float) -> Scalar:
    """Piecewise linear in `position`; booleans and words step instead."""
    anchor = position * (len(values) - 1)
    if abs(anchor - round(anchor)) < 1e-9:  # on an anchor, whatever the division lost
        anchor = round(anchor)
    left = min(int(anchor), len(values) - 1)
    right = min(left + 1, len(values) - 1)
    a, b = values[left], values[right]
    if isinstance(a, bool | str) or isinstance(b, bool | str) or anchor == left:
        return a
    return a + (b - a) * (anchor - left)


def scalars(setting: Setting) -> list[Scalar]:
    """Every scalar that a setting can yield at an anchor: what a range check must look at."""
    if isinstance(setting, tuple):
        return [value for rule in setting for value in scalars(rule.value)]
    return list(setting.values) if isinstance(setting, Gradient) else [setting]
