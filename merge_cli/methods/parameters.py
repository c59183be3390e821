"""A method's signature is its schema: the keyword-only parameters, read from the function itself.

    def ties(base, deltas, *, weight: PerModel[float] = each(1.0), normalize: bool = True)

`weight` may be set for each model (and may vary by layer and filter); `normalize` once for the
merge. A trailing underscore (`lambda_`) spells a parameter whose name is a Python keyword.
Annotations are evaluated one by one, so a module of methods needs torch only for type checkers.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from merge_cli.recipe.values import Scalar

T = TypeVar("T")


@dataclass(frozen=True)
class Range:
    """Bounds of a number; `above` excludes the lower bound.

    `capped` takes what lies above the upper bound for the bound itself.
    """

    low: float | None = None
    high: float | None = None
    above: bool = False
    capped: bool = False

    def __str__(self) -> str:
        if self.low is None:
            return "any number" if self.high is None else f"at most {self.high:g}"
        if self.high is None:
            return f"above {self.low:g}" if self.above else f"at least {self.low:g}"
        if self.capped:
            return f"of at least {self.low:g} (above {self.high:g} counts as {self.high:g})"
        return f"in {'(' if self.above else '['}{self.low:g}, {self.high:g}]"

    def holds(self, value: float) -> bool:
        low_ok = self.low is None or value > self.low or (not self.above and value == self.low)
        return low_ok and (self.high is None or self.capped or value <= self.high)


class _PerModelMark:
    """In an annotation: one value for each source model."""


PerModel = Annotated[Sequence[T], _PerModelMark()]
# Above 1 is 1, as mergekit reads them; 0 keeps nothing.
Density = Annotated[float, Range(0.0, 1.0, capped=True)]
CappedShare = Annotated[float, Range(0.0, 1.0, capped=True)]
Share = Annotated[float, Range(0.0, 1.0)]
# What mergekit takes for a truth value, besides true and false: its own output writes 1.0.
TRUTH: dict[Scalar, bool] = {
    1: True,
    0: False,
    "true": True,
    "false": False,
    "yes": True,
    "no": False,
    "on": True,
    "off": False,
}


def each(value: T) -> Any:
    """The default that every model starts from (typed Any, as it stands where a sequence goes)."""
    return value


@dataclass(frozen=True)
class MethodParameter:
    """One parameter of a method.

    Attributes:
        argument: its name in the function's signature.
        kind: float, int, bool or str; with `choices`, one of those values.
        default: None means that the method derives it from another parameter (its doc says how).
    """

    name: str
    argument: str
    kind: type
    default: Scalar | None
    per_model: bool
    range: Range
    choices: tuple[Scalar, ...]
    doc: str

    def check(self, value: Scalar) -> str:
        """Why a value is refused; empty when it is fine."""
        value = self.read(value)
        if self.choices:
            return "" if value in self.choices and self._same_kind(value) else self._message(value)
        if self.kind is bool:
            return "" if isinstance(value, bool) else self._message(value)
        if self.kind in (int, float):
            number = isinstance(value, int | float) and not isinstance(value, bool)
            is_whole = self.kind is float or (number and float(value) == int(value))
            finite = number and abs(float(value)) != float("inf") and value == value
            return (
                ""
                if finite and is_whole and self.range.holds(float(value))
                else self._message(value)
            )
        return "" if isinstance(value, str) else self._message(value)

    def read(self, value: Scalar) -> Scalar:
        """A value as the recipe writes it, its numbers as truth values where these are meant.

        Done before a gradient is evaluated: truth values step, numbers are interpolated.
        """
        boolean = self.kind is bool or any(isinstance(choice, bool) for choice in self.choices)
        if not boolean or self._same_kind(value):
            return value
        return TRUTH.get(value.lower() if isinstance(value, str) else value, value)

    def coerce(self, value: Scalar) -> Scalar:
        """A checked value in the parameter's own type."""
        if self.choices:
            return value
        if self.range.capped and self.range.high is not None and isinstance(value, int | float):
            value = min(value, self.range.high)
        coerced: Scalar = self.kind(value)
        return coerced

    def is_capped(self, value: Scalar) -> bool:
        """Whether a checked value lies above a bound that it is taken for."""
        high = self.range.high if self.range.capped else None
        return high is not None and not isinstance(value, str) and value > high

    @property
    def allowed(self) -> str:
        """What may stand here, in words."""
        if self.choices:
            return "one of " + ", ".join(_yaml(choice) for choice in self.choices)
        if self.kind is bool:
            return "true or false"
        if self.kind is str:
            return "text"
        number = "a whole number" if self.kind is int else "a number"
        bounded = self.range.low is not None or self.range.high is not None
        return f"{number} {self.range}" if bounded else number

    def _same_kind(self, value: Scalar) -> bool:
        return any(value == c and type(value) is type(c) for c in self.choices)

    def _message(self, value: Scalar) -> str:
        return f"must be {self.allowed} (got {_yaml(value)})"


def read_parameters(function: Callable[..., Any]) -> dict[str, MethodParameter]:
    """The keyword-only parameters of a method, by the name that recipes use.

    Raises:
        TypeError: a parameter without annotation, default or documentation.
    """
    docs = _argument_docs(function)
    namespace = vars(sys.modules[function.__module__])
    result: dict[str, MethodParameter] = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            continue
        name = parameter.name.rstrip("_")
        owner = f"{function.__module__}.{function.__qualname__}: parameter '{parameter.name}'"
        if parameter.default is inspect.Parameter.empty or not docs.get(name):
            raise TypeError(f"{owner} needs a default and a line under Args in the docstring")
        annotation = parameter.annotation
        if isinstance(annotation, str):
            annotation = eval(annotation, namespace)  # the module's own source, not input
        kind, per_model, limits, choices = _read_annotation(annotation, owner)
        result[name] = MethodParameter(
            name, parameter.name, kind, parameter.default, per_model, limits, choices, docs[name]
        )
    return result


def _read_annotation(annotation: Any, owner: str) -> tuple[type, bool, Range, tuple[Scalar, ...]]:
    per_model, limits = False, Range()
    choices: tuple[Scalar, ...] = ()
    while True:
        if get_origin(annotation) is Annotated:
            inner, *marks = get_args(annotation)
            for mark in marks:
                if isinstance(mark, _PerModelMark):
                    per_model = True
                    (inner,) = get_args(inner)
                elif isinstance(mark, Range):
                    limits = mark
            annotation = inner
        elif type(None) in get_args(annotation):  # `X | None`: None means derived
            (annotation,) = (arg for arg in get_args(annotation) if arg is not type(None))
        else:
            break
    if get_origin(annotation) is Literal:
        choices = get_args(annotation)
        annotation = type(choices[0])
    if annotation not in (float, int, bool, str):
        raise TypeError(f"{owner} has a type that recipes cannot hold: {annotation}")
    return annotation, per_model, limits, choices


def _argument_docs(function: Callable[..., Any]) -> dict[str, str]:
    """The `Args:` section of a docstring, by parameter."""
    text = inspect.getdoc(function) or ""
    section = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)+)", text + "\n", flags=re.MULTILINE)
    if not section:
        return {}
    entries = re.findall(r"^    (\w+): ((?:.+)(?:\n {5,}.+)*)", section[1], flags=re.MULTILINE)
    return {name.rstrip("_"): " ".join(body.split()) for name, body in entries}


def _yaml(value: Scalar | None) -> str:
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)
