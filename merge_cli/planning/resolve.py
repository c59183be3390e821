"""A method's parameters: checked where the recipe has them, then resolved for each tensor.

Precedence, as in mergekit: slice source, output slice, module, global, the method's default.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merge_cli.methods.blocks import shared_parameters
from merge_cli.methods.method import Method
from merge_cli.recipe.schema import Parameters, Recipe, SliceSpec, SourceSpec
from merge_cli.recipe.values import (
    Scalar,
    evaluate,
    filters,
    is_graded,
    matches,
)


def resolve(
    recipe: Recipe,
    method: Method,
    output_slice: SliceSpec | None,
    specs: Sequence[SourceSpec],
    tensor: str,
    position: float,
    inputs: Sequence[str] = (),
) -> dict[str, Any]:
    """The method's parameters for one tensor, by the recipe's names; a list where per model.

    Args:
        output_slice: None for a merge of whole models.
        specs: the operands' sources, in order.
        position: the tensor's layer within its slice, 0 to 1.
        inputs: the tensor's name in each source, by that source's own layer numbers, which the
            filters of its parameters look at, as mergekit's do; empty where it is the output's.
    """
    shared = shared_parameters(recipe, output_slice)
    names = inputs or [tensor] * len(specs)
    resolved: dict[str, Any] = {}
    for name, parameter in method.parameters.items():

        def value(layers: Sequence[Parameters], tensor: str, name: str = name) -> Scalar | None:
            parameter = method.parameters[name]
            for parameters in layers:
                if name in parameters:
                    result = evaluate(parameters[name].setting, tensor, position, parameter.read)
                    if result is not None:
                        return parameter.coerce(result)
            return parameter.default

        if parameter.per_model:
            resolved[name] = [
                value([spec.parameters, *shared], name_there)
                for spec, name_there in zip(specs, names, strict=True)
            ]
        else:
            resolved[name] = value(shared, tensor)
    return resolved


@dataclass(frozen=True)
class Resolved:
    """Parameters that many tensors share; nothing may change them.

    Attributes:
        parameters: by the recipe's names.
        error: why tensors cannot be merged with them; empty when they can.
        copies: whether the output is its only source, byte for byte.
    """

    parameters: dict[str, Any]
    error: str
    copies: bool


class Resolver:
    """`resolve` for the tensors of one slice, once for each set of parameters.

    What a setting means depends on the filters that match a tensor's name and, where there are
    gradients, on its position: tensors that agree in both share one answer.
    """

    def __init__(
        self,
        recipe: Recipe,
        method: Method,
        output_slice: SliceSpec | None,
        specs: Sequence[SourceSpec],
    ) -> None:
        self._recipe, self._method, self._output_slice, self._specs = (
            recipe,
            method,
            output_slice,
            specs,
        )
        groups = [spec.parameters for spec in specs] + shared_parameters(recipe, output_slice)
        settings = [parameter.setting for group in groups for parameter in group.values()]
        self._filters = sorted(set().union(*map(filters, settings)))
        self._graded = any(map(is_graded, settings))
        self._cache: dict[tuple[float, tuple[tuple[str, ...], ...]], Resolved] = {}
        self._same: Resolved | None = None  # of all tensors, where nothing tells them apart

    @property
    def filtered(self) -> bool:
        """Whether names decide anything."""
        return bool(self._filters)

    def of(self, tensor: str, position: float, inputs: Sequence[str] = ()) -> Resolved:
        """The parameters of one tensor; arguments as for `resolve`."""
        if not self._filters and not self._graded:
            self._same = self._same or self._resolve(tensor, position, inputs)
            return self._same
        matching = tuple([self._matching(name) for name in (tensor, *inputs)])
        key = position if self._graded else 0.0, matching
        cached = self._cache.get(key)
        if cached is None:
            cached = self._cache[key] = self._resolve(tensor, position, inputs)
        return cached

    def _matching(self, name: str) -> tuple[str, ...]:
        return tuple([item for item in self._filters if matches(item, name)])

    def _resolve(self, tensor: str, position: float, inputs: Sequence[str]) -> Resolved:
        method = self._method
        values = resolve(
            self._recipe, method, self._output_slice, self._specs, tensor, position, inputs
        )
        copies = method.is_identity is not None and method.is_identity(**values)
        return Resolved(values, combination_error(method, values), copies)


def combination_error(method: Method, parameters: Mapping[str, Any]) -> str:
    """Why the resolved parameters of a tensor cannot be merged with; empty when they can."""
    if method.check is None:
        return ""
    requested = inspect.signature(method.check).parameters
    return method.check(**{k: v for k, v in parameters.items() if k in requested})


def arguments(method: Method, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Resolved parameters as the function spells them (`lambda` becomes `lambda_`)."""
    return {method.parameters[name].argument: value for name, value in parameters.items()}
